"""Sets beside the two benchmarks: for transfer, and for examples of other label counts."""

from dataclasses import replace

from ppo_nlu.tasks.glue import MNLI, NLI_COLUMNS, NLI_DESCRIPTION, SST2, THREE_WAY
from ppo_nlu.tasks.spec import Label, TaskSpec

SNLI = replace(
    MNLI,
    name="snli",
    title="SNLI",
    benchmark="extra",
    folder="SNLI",
    columns=NLI_COLUMNS,
    files={"train": ("train.tsv", "train.subset10k.tsv"), "dev": ("dev.tsv",)},
    leaderboard_file="",
)

SIGA_NLI = TaskSpec(
    name="siga-nli",
    title="SIGA-nli",
    benchmark="extra",
    folder="SIGA-nli",
    description=NLI_DESCRIPTION,
    query='Premise: "{premise}". Hypothesis: "{statement}". Now judge the relation.',
    fields=("premise", "statement"),
    labels=THREE_WAY,
    reader="csv",
    files={
        "train": ("train_dataset.csv",),
        "dev": ("test_id_dataset.csv",),
        "ood": ("test_ood_dataset.csv",),  # adjectives not seen in training
    },
)

AG_NEWS = TaskSpec(
    name="ag_news",
    title="AG News",
    benchmark="extra",
    folder="AG_News",
    description=(
        "You read a piece of news. "
        "The task is to decide if it is about the World, Sports, Business or Technology."
    ),
    query='Now judge the subject of the news "{sentence}".',
    fields=("sentence",),
    labels=(
        Label("World", "World"),
        Label("Sports", "Sports"),
        Label("Business", "Business"),
        Label("Technology", "Sci/Tech"),
    ),
    files={"train": ("train.tsv", "train.subset10k.tsv"), "dev": ("test.tsv",)},
)

MR = replace(
    SST2,
    name="mr",
    title="MR",
    benchmark="extra",
    folder="MR",
    files={"train": ("train.tsv",), "dev": ("dev.tsv", "train.no_sst2_devtest.tsv")},
    divide_dev=True,
    leaderboard_file="",
)

TASKS = (SNLI, SIGA_NLI, AG_NEWS, MR)
