"""Runs the tasks beside this file through the real lm_eval."""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
NAMES = ["flexgen_choice", "flexgen_rolling", "flexgen_until"]


def figures(model, tasks=NAMES, **arguments):
    """Per task: its metrics, and per document what the model answered."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model,
        model_args=arguments or None,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        name: {
            "metrics": {
                key.partition(",")[0]: value
                for key, value in found["results"][name].items()
                if isinstance(value, float)
            },
            "answers": [sample["resps"] for sample in found["samples"][name]],
        }
        for name in tasks
    }
