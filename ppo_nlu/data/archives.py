"""The official archives of GLUE and SuperGLUE: where they are and what they must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ppo_nlu.tasks import TaskSpec


@dataclass(frozen=True)
class Archive:
    """An official archive: its address relative to `data.url`, and the number of rows and the
    sha256 of each file that we take ("" where it is unknown: then only the rows are counted).

    `mebibytes` is an upper bound on its size, and 4 times that on each file in it. A program that
    needs the data fetches an `automatic` archive by itself, the others only when asked to.
    """

    name: str
    files: Mapping[str, tuple[int, str]]
    mebibytes: float = 64
    automatic: bool = True


# A line for each archive: the folder that it becomes (as in the tasks' rows), its address and, for
# a large one, the bound in MiB. Below it: its files with their number of rows (MultiRC: paragraphs,
# ReCoRD: queries) and their sha256 where it is known.
_TABLE = """
glue/CoLA CoLA.zip
    train.tsv 8551 cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624
    dev.tsv 1043 8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd
    test.tsv 1063 3b4df85f7a9a0633574b38d181e18090ac961a24b18fb6bcd74999ddea8ad0b8
glue/SST-2 SST-2.zip
    train.tsv 67349 48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1
    dev.tsv 872 54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0
    test.tsv 1821 69a938605609b3e6663b4487918fe1565eb293734e6e520d0366d1d412fd2a13
glue/MRPC ../../senteval/senteval_data/msr_paraphrase_train.txt
    test.tsv 1725
glue/QQP QQP-clean.zip 128
    train.tsv 363846
    dev.tsv 40430
    test.tsv 390965
glue/STS-B STS-B.zip
    train.tsv 5749 41c4d978b6162abdcada7e49a982211954cca5459c228db478af333124b257a2
    dev.tsv 1500 fe7dc0632a5033562f3cadff991f6e8d9b9b6311861660e78c3c82eb7db67f59
    test.tsv 1379 16b4223d7d44a644fbc10f1b449472cfe81e1715fb07cf44023b0aa88ce856eb
glue/MNLI MNLI.zip 400
    train.tsv 392702
    dev_matched.tsv 9815
    dev_mismatched.tsv 9832
    test_matched.tsv 9796
    test_mismatched.tsv 9847
glue/QNLI QNLIv2.zip
    train.tsv 104743
    dev.tsv 5463 ac19409dcb04631eaaa094bdebdcf621086bc352503dfb6a1a648b614986f4fd
    test.tsv 5463 6d856264e292fa7a7bc7b8e182efa1454ffd9532733c12ad813017dd5b377a5a
glue/RTE RTE.zip
    train.tsv 2490 41e3a9b063433392343fad9e962cf2f58b681c78d8f71592f4186f0837246c5c
    dev.tsv 277 80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb
    test.tsv 3000 6e33f09b5c2bfd5fd5fde217070f3dd49e484e33b9752b5864cf36fc421a213f
glue/WNLI WNLI.zip
    train.tsv 635 9a88e9d54b6861cc796a088e9acf4f5f65064a9ef65ae6fa7a688b28391e5c9a
    dev.tsv 71 cba00490596dd14be8cf53b4f53bb744abe3a7b89f81ab210528d80225338ed5
    test.tsv 146 ff0296817e235bf6f7a230c5f6781bd6ee228a45445f6510831fdef6f2a04766
glue/AX AX.tsv
    AX.tsv 1104
superglue/BoolQ ../superglue/data/v2/BoolQ.zip
    train.jsonl 9427
    val.jsonl 3270 0c86a5045886e5795fe9052003873f7d94b88ed3028a33007c51d99e44fd66d9
    test.jsonl 3245 7e898b2585500df403d3551542b26134d71a1630944d97660fa7ca872527dcfe
superglue/CB ../superglue/data/v2/CB.zip
    train.jsonl 250 32017480d3a10508646e3efd64502c639f13d4d15077f278d2fd0992c33a3126
    val.jsonl 56 c6125587e9601560cb16ea223c33964c5a915568d2af68a81f651b6ef25395ec
    test.jsonl 250 860679c4ef6f56758f5530bfbcbf2fd7905667184144f3594ace9bb4c435618d
superglue/COPA ../superglue/data/v2/COPA.zip
    train.jsonl 400 e74ed25f36119fff954d90900ebbaae277e2cc4864be4b961e7a46c8f67d11a9
    val.jsonl 100 fa61467cc251010178ed72f8ca82a0fceefc4ca9a85f87ec3b6102955e1a1f1a
    test.jsonl 500 7c7cd9fb3aa90bb56e0c683b6e556f6640d75388159fd6b551aa87e8a04c667e
superglue/MultiRC ../superglue/data/v2/MultiRC.zip
    train.jsonl 456 bb73d0838618f8269190a2533fead3140607558975ea0df6511fa534e8d3535c
    val.jsonl 83 d2b480195b15574ac00d52c4479f630bc161a7ab2de77e970fd00652846953ee
    test.jsonl 166 1dc6da4f23250d50f600379aaa59618039ad09faba3566af6d17d85e4e68ecfa
superglue/ReCoRD ../superglue/data/v2/ReCoRD.zip 128
    train.jsonl 100730
    val.jsonl 10000
    test.jsonl 10000
superglue/RTE ../superglue/data/v2/RTE.zip
    train.jsonl 2490
    val.jsonl 277
    test.jsonl 3000
superglue/WiC ../superglue/data/v2/WiC.zip
    train.jsonl 5428 ce301970aaf361ade6c1d218fe15c50b185b14a4bcb618c5785a8484a46f9943
    val.jsonl 638 9f7207c88beba42cbc139de4c62ce05b23bffc189b3d561594b160e0c3920c0b
    test.jsonl 1400 fe8fc664243b942d2bc025993ff16ef9c94611c5235bc50d6ed16ff645cc2703
superglue/WSC ../superglue/data/v2/WSC.zip
    train.jsonl 554 0ffaa3fd8d21e58a0805962565d1619aa4819bc3d034255777f606f801ae5a42
    val.jsonl 104 e5c685ea4bdc347354036a28176459f6feeb0b6870375ecfb3d6ddb1f0e28bef
    test.jsonl 146 e278b00238f9f01764f39a934a6515379016c908b2191ff9174bd74296f28310
superglue/AX-b ../superglue/data/v2/AX-b.zip
    AX-b.jsonl 1104
superglue/AX-g ../superglue/data/v2/AX-g.zip
    AX-g.jsonl 356
"""


def _read(table: str) -> dict[str, Archive]:
    found: dict[str, Archive] = {}
    folder = ""
    for line in table.strip().splitlines():
        first, second, *third = line.split()
        if line.startswith(" "):
            files = {**found[folder].files, first: (int(second), "".join(third))}
            found[folder] = replace(found[folder], files=files)
        else:
            folder, size = first, float(third[0]) if third else 64
            found[folder] = Archive(second, {}, size, not third)
    return found


ARCHIVES = _read(_TABLE)  # by benchmark/folder


def archive_of(spec: TaskSpec) -> Archive | None:
    """The archive that holds the task's files; None where none is known."""
    return ARCHIVES.get(f"{spec.benchmark}/{spec.folder}")
