"""The GLUE tasks (Wang et al., 2018): one row each. The wording of the prompts is our own."""

from dataclasses import replace

from ppo_nlu.tasks.spec import Label, Rating, TaskSpec

YES_NO = (Label("Yes", "1"), Label("No", "0"))
ENTAILED = (Label("Yes", "entailment"), Label("No", "not_entailment"))
THREE_WAY = (
    Label("Entailment", "entailment"),
    Label("Neutral", "neutral"),
    Label("Contradiction", "contradiction"),
)
TSV = {"train": ("train.tsv",), "dev": ("dev.tsv",), "test": ("test.tsv",)}
NLI_DESCRIPTION = (
    "You compare a premise with a hypothesis. The task is to decide if the premise makes the "
    "hypothesis true (Entailment), false (Contradiction) or leaves it open (Neutral)."
)
NLI_QUERY = 'Premise: "{premise}". Hypothesis: "{hypothesis}". Now judge the relation.'
NLI_COLUMNS = {"premise": "sentence1", "hypothesis": "sentence2"}
RTE_DESCRIPTION = (
    "You are given a text and a claim. "
    "The task is to decide if a reader of the text would accept the claim as true."
)
RTE_QUERY = 'Text: "{premise}". Claim: "{hypothesis}". Now judge if the claim follows.'

COLA = TaskSpec(
    name="cola",
    title="CoLA",
    benchmark="glue",
    folder="CoLA",
    description=(
        "You read a sentence. The task is to decide if it is linguistically acceptable, "
        "as a fluent speaker of English would say it."
    ),
    query='Now judge if the sentence "{sentence}" is linguistically acceptable.',
    fields=("sentence",),
    labels=YES_NO,
    header=("source", "label", "mark", "sentence"),
    files=TSV,
    metrics=("mcc",),
    leaderboard_file="CoLA.tsv",
    leaderboard_rows=1063,
)

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
    files=TSV,
    leaderboard_file="SST-2.tsv",
    leaderboard_rows=1821,
)

MRPC = TaskSpec(
    name="mrpc",
    title="MRPC",
    benchmark="glue",
    folder="MRPC",
    description=(
        "You compare two sentences from the news. "
        "The task is to decide if they report the same facts."
    ),
    query='Now judge if "{sentence1}" and "{sentence2}" have the same meaning.',
    fields=("sentence1", "sentence2"),
    columns={"sentence1": "#1 String", "sentence2": "#2 String"},
    labels=YES_NO,
    label_column="Quality",
    files={
        "train": ("train.tsv", "train.own_split.tsv"),
        "dev": ("dev.tsv", "dev.own_split.tsv"),
        "test": ("test.tsv", "msr_paraphrase_test.txt"),
    },
    metrics=("f1", "accuracy"),
    paper_metrics=("f1",),
    leaderboard_file="MRPC.tsv",
    leaderboard_rows=1725,
)

QQP = TaskSpec(
    name="qqp",
    title="QQP",
    benchmark="glue",
    folder="QQP",
    description=(
        "You compare two questions asked on a forum. "
        "The task is to decide if one answer would satisfy both."
    ),
    query='Now judge if "{question1}" and "{question2}" ask the same thing.',
    fields=("question1", "question2"),
    labels=YES_NO,
    label_column="is_duplicate",
    files={
        "train": ("train.tsv", "train.subset9k.tsv"),
        "dev": ("dev.tsv", "dev.from_train1k.tsv"),
        "test": ("test.tsv",),
    },
    metrics=("f1", "accuracy"),
    paper_metrics=("f1",),
    leaderboard_file="QQP.tsv",
    leaderboard_rows=390965,
)

STSB = TaskSpec(
    name="stsb",
    title="STS-B",
    benchmark="glue",
    folder="STS-B",
    description=(
        "You rate how close two sentences are in meaning, from 0 (unrelated) to 5 (same meaning)."
    ),
    query='Now rate "{sentence1}" against "{sentence2}".',
    fields=("sentence1", "sentence2"),
    rating=Rating(0.0, 5.0, 0.2),
    label_column="score",
    files=TSV,
    metrics=("pearson", "spearman"),
    reward="rating",
    paper_metrics=("spearman",),
    leaderboard_file="STS-B.tsv",
    leaderboard_rows=1379,
)

MNLI = TaskSpec(
    name="mnli",
    title="MNLI-m",
    benchmark="glue",
    folder="MNLI",
    description=NLI_DESCRIPTION,
    query=NLI_QUERY,
    fields=("premise", "hypothesis"),
    columns=NLI_COLUMNS,
    labels=THREE_WAY,
    label_column="gold_label",
    files={
        "train": ("train.tsv", "train.subset10k.tsv"),
        "dev": ("dev_matched.tsv",),
        "test": ("test_matched.tsv",),
    },
    leaderboard_file="MNLI-m.tsv",
    leaderboard_rows=9796,
)

MNLI_MM = replace(
    MNLI,
    name="mnli-mm",
    title="MNLI-mm",
    files={
        "train": MNLI.files["train"],
        "dev": ("dev_mismatched.tsv",),
        "test": ("test_mismatched.tsv",),
    },
    trained_with="mnli",
    leaderboard_file="MNLI-mm.tsv",
    leaderboard_rows=9847,
)

QNLI = TaskSpec(
    name="qnli",
    title="QNLI",
    benchmark="glue",
    folder="QNLI",
    description=(
        "You are given a question and one sentence. "
        "The task is to decide if the sentence holds the answer."
    ),
    query=(
        'Question: "{question}". Sentence: "{sentence}". '
        "Now judge if the answer is in the sentence."
    ),
    fields=("question", "sentence"),
    labels=ENTAILED,
    files={**TSV, "train": ("train.tsv", "train.subset10k.tsv")},
    leaderboard_file="QNLI.tsv",
    leaderboard_rows=5463,
)

RTE = TaskSpec(
    name="glue/rte",
    title="RTE",
    benchmark="glue",
    folder="RTE",
    description=RTE_DESCRIPTION,
    query=RTE_QUERY,
    fields=("premise", "hypothesis"),
    columns=NLI_COLUMNS,
    labels=ENTAILED,
    files=TSV,
    leaderboard_file="RTE.tsv",
    leaderboard_rows=3000,
)

WNLI = TaskSpec(
    name="wnli",
    title="WNLI",
    benchmark="glue",
    folder="WNLI",
    description=(
        "You are given a text with a pronoun and a claim in which that pronoun is replaced. "
        "The task is to decide if the claim is true given the text."
    ),
    query='Text: "{sentence1}". Claim: "{sentence2}". Now judge if the claim is true.',
    fields=("sentence1", "sentence2"),
    labels=YES_NO,
    files=TSV,
    averages=("official",),  # the paper leaves it out
    leaderboard_file="WNLI.tsv",
    leaderboard_rows=146,
)

AX = replace(
    MNLI,
    name="ax",
    title="AX",
    folder="AX",
    label_column="label",
    reader="ax",  # the labelled file names its columns otherwise
    files={"dev": ("diagnostic-full.tsv",), "test": ("diagnostic.tsv", "AX.tsv")},
    metrics=("mcc",),
    trained_with="mnli",
    averages=(),
    leaderboard_file="AX.tsv",
    leaderboard_rows=1104,
)

# In the order of the paper's table 1.
TASKS = (MNLI, MNLI_MM, QQP, QNLI, SST2, COLA, STSB, MRPC, RTE, WNLI, AX)
