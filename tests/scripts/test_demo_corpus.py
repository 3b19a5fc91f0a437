"""The demo corpus: no held-out text is in the training text, and two runs read the same text."""

import ast

import pytest

from decodax.scripts import demo_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus():
    return demo_corpus.collect()


def lines_of(text):
    """Five-line runs of stripped, non-blank lines: written independently of the code under test."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {tuple(lines[i : i + 5]) for i in range(len(lines) - 4)}


def test_the_splits_share_no_package_and_no_test_of_one(corpus):
    train = {document.package for document in corpus.train}
    heldout = {document.package for document in corpus.heldout}
    assert not train & heldout
    assert heldout >= {"json", "argparse", "textwrap"}
    for document in corpus.train:
        assert not document.path.startswith(("json/", "test/test_json", "test/test_argparse", "argparse"))


def test_the_sizes_are_worth_training_on(corpus):
    code = {name: [d for d in split if not d.is_test] for name, split in vars(corpus).items() if name != "dropped"}
    size = {name: sum(len(d.text) for d in documents) for name, documents in code.items()}
    assert size["train"] > 5e6
    assert 0.04 < size["heldout"] / (size["heldout"] + size["train"]) < 0.09


def test_no_heldout_file_repeats_the_training_text(corpus):
    train = set().union(*(lines_of(document.text) for document in corpus.train))
    for document in corpus.heldout:
        own = lines_of(document.text)
        assert len(own & train) <= 0.1 * len(own), document.path


def test_no_foreign_generated_or_undecodable_files(corpus):
    for document in corpus.train + corpus.heldout:
        assert "site-packages" not in document.path and not document.path.startswith(("encodings/", "pydoc_data/"))
        assert 200 <= len(document.text) <= 400_000
        assert "\r\n" not in document.text


def test_two_calls_give_the_same(corpus):
    assert demo_corpus.collect() == corpus


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())


def program(word, count=40):
    return "".join(f"{word}_variable_{i} = make_{word}(number={i})\n" for i in range(count))


def test_duplicates_leaks_and_tables_are_dropped(tmp_path):
    write(tmp_path, "alpha.py", program("alpha").replace("\n", "\r\n"))
    write(tmp_path, "beta.py", program("alpha", 39) + "last_line_differs = True\n")
    write(tmp_path, "json/decoder.py", program("json"))
    write(tmp_path, "json/stolen.py", program("alpha", 10) + program("fresh", 20))
    write(tmp_path, "table.py", "VALUES = [\n" + "    0x1F, 0x2E, 0x3D, 12345, 67890,\n" * 50 + "]\n")
    write(tmp_path, "latin.py", b"# caf\xe9\n" + program("latin").encode())
    write(tmp_path, "tiny.py", "x = 1\n")
    write(tmp_path, "site-packages/other.py", program("other"))
    write(tmp_path, "test/test_json/test_dump.py", program("dump"))
    corpus = demo_corpus.collect(tmp_path)
    assert [(document.path, document.text) for document in corpus.train] == [("alpha.py", program("alpha"))]
    assert [document.path for document in corpus.heldout] == ["json/decoder.py", "test/test_json/test_dump.py"]
    assert [document.is_test for document in corpus.heldout] == [False, True]
    assert corpus.dropped == {
        "foreign data": 0,
        "not UTF-8": 1,
        "too short or too long": 1,
        "table of numbers": 1,
        "near-duplicate": 1,
        "held-out seen in training": 1,
    }


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected Python source files"):
        demo_corpus.collect(tmp_path)


@pytest.mark.parametrize(
    ("path", "package"),
    [
        ("json/decoder.py", "json"),
        ("test/test_json/test_dump.py", "json"),
        ("test/test_csv.py", "csv"),
        ("test/datetimetester.py", "datetimetester"),
        ("_pydecimal.py", "pydecimal"),
        ("__future__.py", "future"),
        ("idlelib/idle_test/test_run.py", "idlelib"),
        ("test/__init__.py", "init"),
    ],
)
def test_package_of(path, package):
    assert demo_corpus.package_of(path) == package


def test_prompts_are_beginnings_of_heldout_functions(corpus):
    prompts = demo_corpus.heldout_prompts(20, corpus=corpus)
    assert len(set(prompts)) == 20
    texts = [document.text for document in corpus.heldout if not document.is_test]
    for prompt in prompts:
        assert any(prompt in text for text in texts)
        assert prompt.split("#")[0].rstrip().endswith(":") or ":" in prompt.splitlines()[-1]
        # The prompt with an empty body is a whole definition: it ends where the body begins.
        head = prompt[prompt.rindex("def ") :]
        ast.parse(head + "\n    pass")


def test_the_number_of_prompts_is_checked(corpus):
    with pytest.raises(ValueError, match=r"count must be in 1\.\."):
        demo_corpus.heldout_prompts(0, corpus=corpus)
    with pytest.raises(ValueError, match=r"count must be in 1\.\."):
        demo_corpus.heldout_prompts(100_000, corpus=corpus)
