"""What the property tests draw from."""

from hypothesis import strategies as st

from scheduling import (
    SCHEDULES,
    Attend,
    Barrier,
    Compute,
    ComputeExperts,
    Experts,
    FreeWeights,
    LoadCache,
    LoadChosen,
    LoadHidden,
    LoadWeights,
    Project,
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
        for kind in (LoadCache, StoreCache, LoadHidden, StoreHidden, Project, Attend, Compute)
    ),
    *(
        st.builds(kind, numbers, numbers, st.lists(numbers).map(tuple))
        for kind in (LoadChosen, ComputeExperts)
    ),
    st.builds(Barrier, st.none() | numbers),
)


@st.composite
def workloads(draw):
    """Small ones, of one stage or several, with any set of layers cached.

    There are slots enough for every schedule.
    """
    layers = draw(st.integers(1, 5))
    borders = draw(st.frozensets(st.integers(1, layers - 1), max_size=3)) if layers > 1 else ()
    stages = 0, *sorted(borders)
    return Workload(
        num_steps=draw(st.integers(1, 4)),
        num_layers=layers,
        num_batches=draw(st.integers(1, 4)),
        cached_layers=draw(st.none() | st.frozensets(st.integers(0, layers - 1))),
        weight_slots=draw(st.integers(2, 4)),
        cache_slots=draw(st.integers(2, 4)),
        hidden_slots=draw(st.integers(2, 4)),
        store_slots=draw(st.integers(1, 4)),
        stages=stages,
        num_groups=draw(st.integers(1, 5)),
        hosts=draw(st.just(()) | st.just(tuple(range(len(stages))))),
    )


@st.composite
def sparse_workloads(draw):
    """Small ones of models with experts, of few or many tokens."""
    units = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
    layers, routers, at = set(), [], 1
    for count in units:
        routers.append(at)
        layers |= set(range(at + 1, at + 1 + count))
        at += 1 + count
    borders = draw(st.frozensets(st.sampled_from(routers), max_size=2))
    stages = 0, *sorted(borders)
    return Workload(
        num_steps=draw(st.integers(1, 4)),
        num_layers=at + 1,
        num_batches=draw(st.integers(1, 4)),
        weight_slots=draw(st.integers(2, 4)),
        store_slots=draw(st.integers(1, 4)),
        device_batch_size=draw(st.sampled_from([1, 64])),
        stages=stages,
        num_groups=draw(st.integers(1, 5)),
        hosts=draw(st.just(()) | st.just(tuple(range(len(stages))))),
        experts=Experts(frozenset(layers), count=16, chosen=2),
    )


sparse_schedules = st.sampled_from(
    [
        *(schedule for name, schedule in SCHEDULES.items() if name != "lock_step"),
        *(serialized(schedule) for name, schedule in SCHEDULES.items() if name != "lock_step"),
    ]
)
schedules = st.sampled_from(
    [*SCHEDULES.values(), *(serialized(schedule) for schedule in SCHEDULES.values())]
)


def reached_from(issues, index):
    """All that must be done before ``index``, in as many hops as it takes."""
    reached, waiting = set(), list(issues[index].needs)
    while waiting:
        need = waiting.pop()
        if need not in reached:
            reached.add(need)
            waiting.extend(issues[need].needs)
    return reached


def in_parts(ops, workload):
    """A schedule's ops with every layer that attends to a cache computed in parts."""
    there = set()
    for op in ops:
        if isinstance(op, Project):
            there.add((op.step, op.layer, op.batch))
        elif isinstance(op, Compute) and op.step > 0 and workload.has_cache(op.layer):
            cell = op.step, op.layer, op.batch
            if cell not in there:
                yield Project(*cell)
                yield Attend(*cell)
            there.discard(cell)
        yield op
