"""Online DPO on T2: two answers a prompt, told apart by the task itself."""

from tests.acceptance.bench import Bench, Figure, method
from tests.acceptance.online import OnlineTask


@method("online_dpo")
def measure(bench: Bench) -> list[Figure]:
    task = OnlineTask(bench)
    settings = {"rollout": {"num_generations": 2}, "batch_size": 32, "max_steps": 120, "learning_rate": 5e-4}
    run = task.train("online-dpo", {"name": "online_dpo"}, **settings)
    return [Figure("T2: mean reward after 120 steps", task.reward(run), at_least=0.8, start=task.reward(task.start))]
