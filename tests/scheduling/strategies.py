"""What the property tests draw from."""

from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Barrier,
    Compute,
    FreeWeights,
    LoadCache,
    LoadHidden,
    LoadWeights,
    StoreCache,
    StoreHidden,
    Workload,
    serialized,
)

numbers = st.integers(0, 10**6)
ops = st.one_of(
    st.builds(LoadWeights, numbers, numbers),
    st.builds(FreeWeights, numbers),
    *(
        st.builds(kind, numbers, numbers, numbers)
        for kind in (LoadCache, StoreCache, LoadHidden, StoreHidden, Compute)
    ),
    st.just(Barrier()),
)


@st.composite
def workloads(draw):
    """Small ones, with any set of layers cached, and slots enough for every schedule."""
    layers = draw(st.integers(1, 5))
    return Workload(
        num_steps=draw(st.integers(1, 4)),
        num_layers=layers,
        num_batches=draw(st.integers(1, 4)),
        cached_layers=draw(st.none() | st.frozensets(st.integers(0, layers - 1))),
        weight_slots=draw(st.integers(2, 4)),
        cache_slots=draw(st.integers(2, 4)),
        hidden_slots=draw(st.integers(2, 4)),
        store_slots=draw(st.integers(1, 4)),
    )


schedules = st.sampled_from(
    [*SCHEDULES.values(), *(serialized(schedule) for schedule in SCHEDULES.values())]
)
