"""Data references: which samples, in which form, and every way in which they can be wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.hub.data import IGNORED, load_data
from fewbits.hub.loaded import LoadedModel
from fewbits.hub.models import load_model
from fewbits.hub.preprocess import image_transform
from fewbits.hub.sources import check_data_ref, open_source

PIL = pytest.importorskip("PIL.Image")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


class Tokenizer:
    """A letter is a token; no letter is 0, the end of text."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) - 64 for letter in text]


def classifier(size: int = 8, **config: Any) -> LoadedModel:
    shape = [3, size, size]
    plain = {
        "kind": "plain",
        "input_size": shape,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, 4))
    return LoadedModel("m", "module", model, "image", config, {}, plain)


def language_model(length: int = 8) -> LoadedModel:
    model = torch.nn.Embedding(64, 64)
    return LoadedModel(
        "m", "module", model, "text-generation", {"max_length": length, "vocab_size": 64}, {}, None, Tokenizer()
    )


def png(colour: int, size: tuple[int, int] = (8, 8)) -> bytes:
    held = io.BytesIO()
    PIL.new("RGB", size, (colour, 255 - colour, 7)).save(held, "png")
    return held.getvalue()


def write_parquet(path: Path, count: int = 20, **columns: Any) -> Path:
    table = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)],
        "label": [i % 4 for i in range(count)],
        **columns,
    }
    parquet.write_table(pyarrow.table(table), path)
    return path


def inputs(data: Any) -> torch.Tensor:
    return torch.cat(list(data.batches()))


# -- images ----------------------------------------------------------------------------------------------------------
def test_evaluation_takes_the_first_in_order(tmp_path: Path) -> None:
    data = load_data(write_parquet(tmp_path / "a.parquet"), classifier(), purpose="evaluation", samples=7, batch_size=3)
    batches = list(data)
    assert [len(batch.inputs) for batch in batches] == [3, 3, 1] and len(data) == 3
    assert torch.cat([b.targets for b in batches if b.targets is not None]).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert data.description["subset"] == "the first 7 of 20"
    red = (inputs(data)[:, 0, 0, 0] * 0.25 + 0.5) * 255
    assert torch.allclose(red, torch.arange(7.0), atol=1e-3)


def test_calibration_is_drawn_with_the_seed_without_replacement(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet")

    def drawn(**options: Any) -> list[int]:
        data = load_data(file, classifier(), **{"samples": 9, "batch_size": 4, **options})
        return ((inputs(data)[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int().tolist()

    assert drawn(seed=1) == drawn(seed=1) == drawn(seed=1, batch_size=2)
    assert drawn(seed=1) != drawn(seed=2)
    assert len(set(drawn(seed=3))) == 9
    assert sorted(drawn(samples=None)) == list(range(20))


def test_fingerprint_follows_the_inputs_alone(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet")
    same = {load_data(file, classifier(), samples=5, batch_size=size, seed=4).fingerprint for size in (1, 2, 5)}
    walked = load_data(file, classifier(), samples=5, batch_size=2, seed=4)
    list(walked)
    assert same == {walked.fingerprint}
    others = [
        load_data(file, classifier(), samples=5, batch_size=2, seed=5),
        load_data(file, classifier(), samples=4, batch_size=2, seed=4),
        load_data(file, classifier(size=16), samples=5, batch_size=2, seed=4),
    ]
    assert not same & {other.fingerprint for other in others}


def test_image_folder_alternates_its_classes(tmp_path: Path) -> None:
    for name, colours in (("b", (1, 2, 3)), ("a", (4, 5)), ("c", (6,))):
        (tmp_path / "d" / name).mkdir(parents=True)
        for colour in colours:
            (tmp_path / "d" / name / f"{colour}.png").write_bytes(png(colour))
    data = load_data(tmp_path / "d", classifier(), purpose="evaluation", batch_size=6)
    assert next(iter(data)).targets.tolist() == [0, 1, 2, 0, 1, 1]  # type: ignore[union-attr]
    named = load_data(tmp_path / "d", classifier(label_names=["c", "x", "b", "a"]), purpose="evaluation", batch_size=6)
    assert next(iter(named)).targets.tolist() == [3, 2, 0, 3, 2, 2]  # type: ignore[union-attr]


def test_images_without_labels_calibrate(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for colour in range(3):
        (tmp_path / "d" / f"{colour}.png").write_bytes(png(colour))
    data = load_data(tmp_path / "d", classifier(), batch_size=2)
    assert all(batch.targets is None for batch in data) and data.samples == 3


def test_parquet_folder_and_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / f"{name}.parquet", count=3)
    assert len(open_source(tmp_path, split="train")) == 6
    with pytest.raises(FewbitsError, match="several files"):
        open_source(tmp_path)
    with pytest.raises(FewbitsError, match="no split 'dev'; it has: test, train"):
        open_source(tmp_path, split="dev")


def test_records_come_in_the_order_asked_for(tmp_path: Path) -> None:
    """Across row groups, files and blocks."""
    for part in range(2):
        table = pyarrow.table({"text": [f"{part}-{i}" for i in range(400)], "label": list(range(400))})
        parquet.write_table(table, tmp_path / f"train-0000{part}-of-00002.parquet", row_group_size=37)
    source = open_source(tmp_path)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(0)).tolist()
    assert [record.item for record in source.records(order)] == [f"{i // 400}-{i % 400}" for i in order]


def test_hub_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    del datasets
    write_parquet(tmp_path / "test.parquet", count=6)
    data = load_data(f"hf-dataset:{tmp_path}:test", classifier(), purpose="evaluation", batch_size=6)
    plain = load_data(tmp_path / "test.parquet", classifier(), purpose="evaluation", batch_size=6)
    assert data.fingerprint == plain.fingerprint
    with pytest.raises(FewbitsError, match="could not be loaded"):
        load_data(f"hf-dataset:{tmp_path}:none", classifier())


@pytest.mark.parametrize(("size", "crop"), [((8, 8), 1.0), ((20, 13), 0.875), ((13, 20), 0.9), ((5, 6), 1.0)])
def test_plain_preprocessing_is_timms(size: tuple[int, int], crop: float) -> None:
    pytest.importorskip("timm")
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image = PIL.fromarray(noise.numpy())
    spec = {
        "input_size": [3, 8, 8],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bilinear",
        "crop_pct": crop,
    }
    mine = image_transform({"kind": "plain", **spec})(image)
    theirs = image_transform({"kind": "timm", **spec, "crop_mode": "center"})(image)
    assert mine.shape == theirs.shape == (3, 8, 8)
    assert (mine - theirs).abs().max() < 0.03  # rounding of the resized size may differ by a pixel at most


# -- text ------------------------------------------------------------------------------------------------------------
def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@settings(max_examples=60, deadline=None)
@given(length=st.integers(10, 60), window=st.integers(1, 9), stride=st.integers(1, 9), batch=st.integers(1, 5))
def test_every_token_counts_once(
    tmp_path_factory: pytest.TempPathFactory, length: int, window: int, stride: int, batch: int
) -> None:
    """Whatever the stride, each scored position is a different token of the text, in order and without a gap."""
    stride = min(stride, window)
    text = "".join(chr(65 + i % 26) for i in range(length))
    file = write_text(tmp_path_factory.mktemp("t") / "a.txt", text)
    data = load_data(file, language_model(9), purpose="evaluation", seqlen=window, stride=stride, batch_size=batch)
    scored: list[int] = []
    for one in data:
        assert one.targets is not None and one.inputs.shape == one.targets.shape
        for row, target in zip(one.inputs, one.targets, strict=True):
            kept = target != IGNORED
            assert torch.equal(row[1:][kept[:-1]], target[:-1][kept[:-1]])  # the target is the next input
            scored += target[kept].tolist()
    tokens = [ord(letter) - 64 for letter in text]
    assert scored == tokens[1 : 1 + len(scored)]
    assert len(tokens) - 1 - len(scored) < stride  # only what fills no further window is left


def test_documents_are_joined_after_the_end_token(tmp_path: Path) -> None:
    rows = [{"text": "AB"}, {"text": "CDE"}]
    lines = write_text(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    data = load_data(lines, language_model(), purpose="evaluation", seqlen=6, batch_size=1)
    assert inputs(data).tolist() == [[0, 1, 2, 0, 3, 4]]
    single = load_data(
        write_text(tmp_path / "a.txt", "ABCDE"), language_model(), purpose="evaluation", seqlen=3, batch_size=1
    )
    assert inputs(single).tolist() == [[1, 2, 3]]


def test_random_windows(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.txt", "".join(chr(65 + i % 26) for i in range(200)))
    one, same, other = (load_data(file, language_model(), samples=40, seed=seed, batch_size=8) for seed in (1, 1, 2))
    assert torch.equal(inputs(one), inputs(same)) and not torch.equal(inputs(one), inputs(other))
    assert inputs(one).shape == (40, 8) and one.description["window"] == 8
    assert ((inputs(one)[:, 1:] - inputs(one)[:, :-1]) % 26 == 1).all()  # consecutive tokens of the text
    exact = load_data(write_text(tmp_path / "b.txt", "ABCDEFGHI"), language_model(), samples=3)
    assert inputs(exact).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 3


def test_demo_data() -> None:
    for name, shape in (("text", (256,)), ("digits", (1, 8, 8))):
        loaded = load_model(f"demo:{name}")
        data = load_data(f"demo:{name}", loaded, samples=6, batch_size=4)
        assert inputs(data).shape == (6, *shape)
        evaluated = load_data(f"demo:{name}", loaded, purpose="evaluation", samples=6, batch_size=6)
        assert data.description["split"] == "calibration" and evaluated.description["split"] == "evaluation"
        assert not torch.equal(inputs(data), inputs(evaluated))
    with pytest.raises(FewbitsError, match="belongs to the model demo:text"):
        load_data("demo:text", loaded)


def test_tables_of_labelled_sentences(tmp_path: Path) -> None:
    files = {
        "a.tsv": 'a "quoted" one\t1\nthe other\t0\n',
        "b.tsv": 'label\tsentence\n1\ta "quoted" one\n0\tthe other\n',
        "a.csv": 'text,label\n"a ""quoted"" one",1\nthe other,0\n',
        "a.jsonl": '{"text": "a \\"quoted\\" one", "label": 1}\n\n{"text": "the other", "label": 0}\n',
    }
    for name, content in files.items():
        source = open_source(write_text(tmp_path / name, content))
        got = [(record.item, record.label) for record in source.records(range(len(source)))]
        assert got == [('a "quoted" one', 1), ("the other", 0)], name


# -- what is wrong ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "holds no samples"),
        ("blank.txt", "  \n\n ", "holds no samples"),
        ("empty.jsonl", "", "holds no samples"),
        ("short.txt", "ABC", "fewer than one window"),
        ("bad.jsonl", "{\n", r"line 1 is not JSON"),
        ("field.jsonl", '{"body": "x"}\n', "no string field 'text'"),
        ("bad.parquet", "PAR1 not really", "no readable parquet"),
        ("what.xyz", "x", "unknown kind of file"),
        ("ragged.tsv", "one\t1\ntwo\n", "row 2 has 1 columns"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(FewbitsError, match=words):
        load_data(write_text(tmp_path / name, content), language_model())


def test_bad_images_and_labels(tmp_path: Path) -> None:
    empty = write_parquet(tmp_path / "empty.parquet", count=0)
    with pytest.raises(FewbitsError, match="holds no samples"):
        load_data(empty, classifier())
    (tmp_path / "none").mkdir()
    with pytest.raises(FewbitsError, match="holds no samples"):
        load_data(tmp_path / "none", classifier())
    broken = write_parquet(
        tmp_path / "b.parquet", count=2, image=[{"bytes": png(1), "path": ""}, {"bytes": b"nothing", "path": ""}]
    )
    with pytest.raises(FewbitsError, match=r"b\.parquet row 1 is no readable image"):
        list(load_data(broken, classifier()))
    with pytest.raises(FewbitsError, match=r"has no column .*it has: a"):
        parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "c.parquet")
        load_data(tmp_path / "c.parquet", classifier())
    named = write_parquet(tmp_path / "n.parquet", count=1, label=["cat"])
    with pytest.raises(FewbitsError, match="label 'cat' is none of the classes"):
        list(load_data(named, classifier(label_names=["dog"])))


def test_impossible_requests(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", count=5)
    text = write_text(tmp_path / "a.txt", "A" * 100)
    for ref, loaded, options, words in (
        (file, classifier(), {"samples": 6}, "holds 5 samples, fewer than the 6"),
        (file, classifier(), {"samples": 0}, "samples 0"),
        (file, classifier(), {"batch_size": 0}, "batch size 0"),
        (file, classifier(), {"purpose": "training"}, "purpose"),
        (file, language_model(), {}, "holds images"),
        (text, classifier(), {}, "does not take"),
        (text, language_model(), {"seqlen": 9}, "takes 8 tokens at most"),
        (text, language_model(), {"seqlen": 4, "stride": 5}, "left out"),
        (file, classifier(), {"split": "test"}, "has no split"),
        (tmp_path / "no.txt", language_model(), {}, "does not exist"),
        ("hf-dataset:", language_model(), {}, "not of the form"),
        ("demo:texts", language_model(), {}, "did you mean text"),
    ):
        with pytest.raises(FewbitsError, match=words):
            load_data(ref, loaded, **options)


def test_cheap_check_agrees(tmp_path: Path) -> None:
    check_data_ref(write_parquet(tmp_path / "a.parquet", count=1))
    check_data_ref("demo:text:evaluation")
    check_data_ref("hf-dataset:name:config:split")
    for ref in (tmp_path / "no.parquet", write_text(tmp_path / "e.jsonl", ""), "hf-dataset:a:b:c:d", "demo:nope", ""):
        with pytest.raises(FewbitsError):
            check_data_ref(ref)
