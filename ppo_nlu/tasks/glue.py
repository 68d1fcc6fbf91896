"""The GLUE tasks (Wang et al., 2018): one row each."""

from ppo_nlu.tasks.spec import Label, TaskSpec

SST2 = TaskSpec(
    name="sst2",
    title="SST-2",
    benchmark="glue",
    folder="SST-2",
    description=(
        "You read a sentence from a film review. "
        "The task is to decide if its overall opinion is favourable or unfavourable."
    ),
    query='Now judge the opinion of the sentence "{sentence}".',
    fields=("sentence",),
    labels=(Label("Positive", "1"), Label("Negative", "0")),
    label_column="label",
    files={"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)},
)

TASKS = (SST2,)
