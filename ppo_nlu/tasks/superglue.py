"""The SuperGLUE tasks (Wang et al., 2019): one row each. The wording is this project's own."""

from dataclasses import replace

from ppo_nlu.tasks.glue import ENTAILED, RTE_DESCRIPTION, RTE_QUERY, THREE_WAY
from ppo_nlu.tasks.spec import Label, TaskSpec

JSONL = {"train": ("train.jsonl",), "dev": ("val.jsonl",), "test": ("test.jsonl",)}

BOOLQ = TaskSpec(
    name="boolq",
    title="BoolQ",
    benchmark="superglue",
    folder="BoolQ",
    description="You answer a question from the passage alone.",
    query='Passage: "{passage}". Now answer: "{question}?"',
    fields=("passage", "question"),
    labels=(Label("Yes", "true"), Label("No", "false")),
    reader="jsonl",
    files=JSONL,
    divide_dev=True,
    leaderboard_file="BoolQ.jsonl",
    leaderboard_rows=3245,
)

CB = TaskSpec(
    name="cb",
    title="CB",
    benchmark="superglue",
    folder="CB",
    description=(
        "You are given a text and a claim that is embedded in what a speaker says. The task is to "
        "decide if the text makes the claim true (Entailment), false (Contradiction) or leaves it "
        "open (Neutral)."
    ),
    query='Text: "{premise}". Claim: "{hypothesis}". Now judge the relation.',
    fields=("premise", "hypothesis"),
    labels=THREE_WAY,
    reader="jsonl",
    files=JSONL,
    metrics=("macro_f1", "accuracy"),
    leaderboard_file="CB.jsonl",
    leaderboard_rows=250,
)

COPA = TaskSpec(
    name="copa",
    title="COPA",
    benchmark="superglue",
    folder="COPA",
    description=(
        "You are given a situation and two candidates. "
        "The task is to pick the more likely {question}."
    ),
    query=(
        'Situation: "{premise}". First: "{choice1}". Second: "{choice2}". '
        "Now choose the {question}."
    ),
    fields=("premise", "choice1", "choice2", "question"),
    labels=(Label("First", "0", submitted=0), Label("Second", "1", submitted=1)),
    reader="jsonl",
    files=JSONL,
    leaderboard_file="COPA.jsonl",
    leaderboard_rows=500,
)

MULTIRC = TaskSpec(
    name="multirc",
    title="MultiRC",
    benchmark="superglue",
    folder="MultiRC",
    description=(
        "You check one proposed answer against a passage; "
        "several answers to a question may be right."
    ),
    query=(
        'Passage: "{passage}". Question: "{question}". Proposed answer: "{answer}". Now judge it.'
    ),
    fields=("passage", "question", "answer"),
    labels=(Label("True", "1", submitted=1), Label("False", "0", submitted=0)),
    reader="multirc",
    files=JSONL,
    metrics=("f1a", "em"),
    leaderboard_file="MultiRC.jsonl",
    leaderboard_rows=9693,  # in 166 objects
    leaderboard_layout="paragraphs",
)

RECORD = TaskSpec(
    name="record",
    title="ReCoRD",
    benchmark="superglue",
    folder="ReCoRD",
    description=("You check if a news statement, completed with a name, agrees with the article."),
    query='Article: "{passage}". Statement: "{statement}". Now judge the statement.',
    fields=("passage", "statement"),
    labels=(Label("Yes", "1"), Label("No", "0")),
    reader="record",
    files={
        "train": ("train.jsonl", "train.fewglue32.jsonl"),
        "dev": ("val.jsonl", "dev.fewglue32.jsonl"),
        "test": ("test.jsonl",),
    },
    metrics=("record_f1", "record_em"),
    leaderboard_file="ReCoRD.jsonl",
    leaderboard_rows=10000,
    leaderboard_layout="queries",
)

RTE = TaskSpec(
    name="superglue/rte",
    title="RTE",
    benchmark="superglue",
    folder="RTE",
    description=RTE_DESCRIPTION,
    query=RTE_QUERY,
    fields=("premise", "hypothesis"),
    labels=ENTAILED,
    reader="jsonl",
    files=JSONL,
    leaderboard_file="RTE.jsonl",
    leaderboard_rows=3000,
)

WIC = TaskSpec(
    name="wic",
    title="WiC",
    benchmark="superglue",
    folder="WiC",
    description=(
        "You see one word in two sentences. The task is to decide if it carries the same sense."
    ),
    query='Word: "{word}". 1: "{sentence1}". 2: "{sentence2}". Now judge the sense.',
    fields=("word", "sentence1", "sentence2"),
    labels=(Label("Same", "true"), Label("Different", "false")),
    reader="jsonl",
    files=JSONL,
    leaderboard_file="WiC.jsonl",
    leaderboard_rows=1400,
)

WSC = TaskSpec(
    name="wsc",
    title="WSC",
    benchmark="superglue",
    folder="WSC",
    description=("You resolve a pronoun. The task is to decide if it stands for the given phrase."),
    query='Text: "{text}". Now judge if *{span2_text}* means "{span1_text}".',
    fields=("text", "span2_text", "span1_text"),
    labels=(
        Label("Yes", "true", submitted="True"),
        Label("No", "false", submitted="False"),
    ),
    reader="wsc",
    files=JSONL,
    leaderboard_file="WSC.jsonl",
    leaderboard_rows=146,
)

AX_B = replace(
    RTE,
    name="ax-b",
    title="AX-b",
    folder="AX-b",
    columns={"premise": "sentence1", "hypothesis": "sentence2"},
    files={"dev": ("AX-b.jsonl",), "test": ("AX-b.jsonl",)},
    metrics=("mcc",),
    trained_with="superglue/rte",
    averages=(),
    leaderboard_file="AX-b.jsonl",
    leaderboard_rows=1104,
)

AX_G = replace(
    RTE,
    name="ax-g",
    title="AX-g",
    folder="AX-g",
    reader="axg",  # rows 2i and 2i+1 are a pair
    files={"dev": ("AX-g.jsonl",), "test": ("AX-g.jsonl",)},
    metrics=("gender_parity", "accuracy"),
    trained_with="superglue/rte",
    averages=(),
    leaderboard_file="AX-g.jsonl",
    leaderboard_rows=356,
)

# In the order of the paper's table 2.
TASKS = (BOOLQ, CB, COPA, MULTIRC, RECORD, RTE, WIC, WSC, AX_B, AX_G)
