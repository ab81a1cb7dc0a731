"""inspect shows what the model sees: the ids of the cache, what was cut, unknown tokens, and lengths."""

import html
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from t5tune.commands.inspect import inspect
from t5tune.commands.prepare import prepare
from t5tune.errors import DataError, SettingsError
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.progress import Event, Note
from t5tune.settings import InspectSettings, PrepareSettings, TrainSettings, write_settings
from tests.support.caches import find_cache, open_only
from tests.support.models.tokenizer_kinds import write_config
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.servers.hub import serve_hub

pytestmark = pytest.mark.slow

RECORDS = [
    ["Hi", "Yes\n  {x}"],
    ["lamp " * 50, "table " * 50, "And?", "猫 No"],
    ["Hi", "a"],
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    lines = []
    for texts in RECORDS:
        turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
        lines.append(json.dumps({"conversations": turns}))
    (folder / "data.jsonl").write_text("\n".join(lines * 1))
    prepare(
        PrepareSettings(
            model_name_or_path="pocket",
            data_path=str(folder / "data.jsonl"),
            output_dir=folder / "cache",
            model_max_length=40,
            add_tokens=["\n", "{", "}"],
        )
    )
    return folder / "cache"


def test_json_output_equals_the_examples_of_the_cache(cache: Path) -> None:
    done = t5tune_in_fork("inspect", cache, "--all", "--json")
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    opened, tokenizer = open_only(cache), AutoTokenizer.from_pretrained(find_cache(cache) / "tokenizer")
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert [(line["conversation"], line["turn"]) for line in lines] == [(0, 1), (1, 1), (1, 3), (2, 1)]
    for line, example in zip(lines, opened, strict=True):
        assert line["source_ids"] == example.source_S.tolist()
        assert line["target_ids"] == example.target_T.tolist()
        assert line["source_text"] == tokenizer.decode(line["source_ids"], skip_special_tokens=False)[: -len("</s>")]
    assert lines[0]["source_text"] == "Human: Hi Assistant:"
    assert lines[0]["target_text"] == "Yes\n  {x}"
    assert [line["truncated"] for line in lines] == [[], ["source", "target"], ["source"], []]


@pytest.mark.parametrize("add_tokens", ["auto", "none", "fastchat"])
def test_concatenated_runs_are_the_whole_text(tmp_path: Path, add_tokens: str) -> None:
    texts = ["Hi  there", '{"a": 1}', "a\n  b\n c", "  猫 {  x}  y \n", "\t- é", "Yes ½  no"]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [
        {"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)
    ]}))  # fmt: skip
    prepare(
        PrepareSettings(
            model_name_or_path="pocket",
            data_path=str(tmp_path / "data.jsonl"),
            output_dir=tmp_path / "cache",
            add_tokens=add_tokens,
        )
    )
    examples = inspect(InspectSettings(cache=tmp_path / "cache", all=True)).examples
    added = set(examples.cache.manifest["added_token_ids"])
    assert len(examples) == 3
    for example in examples:
        runs = example.group_runs_by_side(examples.tokenizer, added)
        joined = {side: "".join(run.text for run, _ in of_side) for side, of_side in runs.items()}
        assert joined == {"source": f"{example.source_text}</s>", "target": f"{example.target_text}</s>"}


def test_truncated_text_is_shown_struck_through(cache: Path) -> None:
    (example,) = inspect(InspectSettings(cache=cache, worst_cut=True)).examples
    tokenizer = AutoTokenizer.from_pretrained(find_cache(cache) / "tokenizer")
    assert example.index in {1, 2}
    whole = [
        *example.source_ids[: example.source_head],
        *example.source_cut,
        *example.source_ids[example.source_head : -1],
    ]
    assert tokenizer.decode(whole).startswith("Human: " + "lamp " * 50)
    (cut,) = inspect(InspectSettings(cache=cache, example=1)).examples
    assert tokenizer.decode([*cut.target_ids, *cut.target_cut]).strip() == ("table " * 50).strip()
    done = t5tune_in_fork("inspect", cache, "--example", 1, env={"FORCE_COLOR": "1", "COLUMNS": "200"})
    assert "\x1b[2;9;32m" in done.stdout  # dim, struck through, in the target's color
    assert f"{len(cut.target_cut)} cut off" in done.stdout
    assert "[cut: " not in done.stdout
    plain = t5tune_in_fork("inspect", cache, "--example", 1, env={"TERM": "dumb", "COLUMNS": "200"}).stdout
    kept, whole = tokenizer.decode(cut.target_ids), tokenizer.decode([*cut.target_ids, *cut.target_cut])
    assert f"{kept}[cut: {whole.removeprefix(kept)}]" in plain


def test_the_example_with_unknown_tokens_is_found(cache: Path, tmp_path: Path) -> None:
    (example,) = inspect(InspectSettings(cache=cache, unknown=True)).examples
    assert example.index == 2
    done = t5tune_in_fork("inspect", cache, "--unknown")
    assert "<unk> No" in done.stdout


def test_a_choice_without_a_matching_example_is_reported(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"source": "Hi", "target": "a"}), encoding="utf-8")
    whole = tmp_path / "cache"
    prepare(PrepareSettings(model_name_or_path="pocket", data_path=str(data), output_dir=whole))
    for flag, what in (("--worst-cut", "is truncated"), ("--unknown", "has unknown tokens")):
        done = t5tune_in_fork("inspect", whole, flag)
        assert done.code == 0
        assert f"none of its examples (1) {what}" in " ".join(done.stderr.split())
        assert t5tune_in_fork("inspect", whole, flag, "--json").stdout == ""


def test_no_window_of_a_raw_text_is_shown_as_truncated(tmp_path: Path) -> None:
    data, made = tmp_path / "data.txt", tmp_path / "cache"
    data.write_text("lamp and table " * 200, encoding="utf-8")
    values = {"model_name_or_path": "pocket", "data_path": str(data), "output_dir": made, "model_max_length": 64}
    assert prepare(PrepareSettings(**values, objective="span-corruption")).examples > 1
    events: list[Event] = []
    assert not inspect(InspectSettings(cache=made, worst_cut=True), events.append).examples
    (note,) = [event.text for event in events if isinstance(event, Note)]
    assert note.startswith(f"{made / 'data'}: none of its examples (")


def test_the_histograms_count_every_example(cache: Path) -> None:
    statistics = inspect(InspectSettings(cache=cache, stats=True, per_device_train_batch_size=2)).statistics
    assert statistics is not None
    sources, targets = open_only(cache).read_lengths()
    for histogram, lengths in ((statistics.source, sources), (statistics.target, targets)):
        assert sum(histogram.counts) == 4
        for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
            assert count == np.sum((lengths >= low) & (lengths < high))
    assert statistics.longest[0] == int(np.argmax(sources + targets))
    assert 0 < statistics.padding_random < 1
    done = t5tune_in_fork("inspect", cache, "--stats")
    assert done.code == 0
    assert "padding in batches of 8" in done.stdout


def test_the_page_is_one_complete_file(cache: Path, tmp_path: Path) -> None:
    done = t5tune_in_fork("inspect", cache, "--all", "--html", tmp_path / "page.html")
    assert done.stdout.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article>") == 4
    assert "http" not in page
    assert '<span class="cut">' in page
    assert '<span class="unknown">&lt;unk&gt;</span>' in page
    assert '<span class="added">{</span>x<span class="added">}</span>' in page


def prepare_pairs(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"source": source, "target": target}) for source, target in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = PrepareSettings(
        model_name_or_path="pocket", data_path=str(folder / "pairs.jsonl"), output_dir=folder / "pairs"
    )
    return prepare(settings).cache


def test_a_default_page_shows_fifty_evenly_spaced_examples(tmp_path: Path) -> None:
    big = prepare_pairs(tmp_path, [(f"<b>question {number}</b>", "yes") for number in range(120)])
    page, notes = tmp_path / "page.html", []
    shown = inspect(InspectSettings(cache=big, html=page), notes.append).examples
    indices = [example.index for example in shown]
    assert (len(set(indices)), indices[0], indices[-1]) == (50, 0, 119)
    assert max(after - before for before, after in pairwise(indices)) == 3
    text = page.read_text()
    assert text.count("<article>") == 50
    assert "50 of 120 examples" in text
    assert "question 119" in text
    assert '<span class="added">&lt;</span>' in text
    assert [note.text for note in notes] == [
        "the page shows 50 of 120 examples, evenly spaced; --all shows all of them"
    ]
    inspect(InspectSettings(cache=big, html=page, all=True))
    assert page.read_text().count("<article>") == 120


def test_a_page_says_what_its_colors_mean(cache: Path, tmp_path: Path) -> None:
    inspect(InspectSettings(cache=cache, html=tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    legend = text.partition('<ul class="colors">')[2].partition("</ul>")[0]
    explained = set(re.findall(r'<span class="(.*?)">', legend))
    used = set(re.findall(r'<(?:span|pre) class="(.*?)">', text.partition("</ul>")[2]))
    assert used == explained == {"source", "target", "cut", "added", "unknown", "special"}
    style = text.partition("</style>")[0]
    assert all(f".{kind}" in style for kind in explained)


def test_a_page_too_large_for_browsers_is_cut_short(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t5tune.reports.cache_page.MAX_EXAMPLE_CHARACTERS", 1)
    notes: list[Any] = []
    inspect(InspectSettings(cache=cache, html=tmp_path / "page.html", all=True), notes.append)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<article>") == 1
    assert "1 of 4 examples" in text
    (note,) = notes
    assert "shows the first 1 of 4 examples" in note.text


def test_the_last_bar_collects_a_long_tail(tmp_path: Path) -> None:
    long_one = prepare_pairs(
        tmp_path, [("word " * (1 + number % 10), "yes") for number in range(150)] + [("word " * 400, "yes")]
    )
    statistics = inspect(InspectSettings(cache=long_one, stats=True)).statistics
    assert statistics is not None
    lengths = open_only(long_one).read_lengths()[0]
    histogram = statistics.source
    assert sum(histogram.counts) == 151
    assert histogram.counts[-1] == 1
    assert histogram.counts.count(0) <= 1  # without the tail's bar, all but two of twenty
    assert histogram.edges[-1] == max(lengths) + 1
    label = histogram.label_bars()[-1]
    assert label == f"{histogram.edges[-2]} and more"
    assert not statistics.target.has_tail
    assert label in t5tune_in_fork("inspect", long_one, "--stats").stdout
    inspect(InspectSettings(cache=long_one, html=tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert f"<title>{label}: 1</title>" in text
    widths = {float(width) for width in re.findall(r'<rect class="bar-0" .*? width="([0-9.]+)"', text)}
    assert max(widths) - min(widths) < 0.2


def test_missing_examples_and_broken_caches_are_refused(cache: Path, tmp_path: Path) -> None:
    def refusal(**choice: Any) -> str:
        with pytest.raises((DataError, SettingsError)) as caught:
            inspect(InspectSettings(**{"cache": cache, **choice}))
        return caught.value.message

    assert "contains examples 0 to 3" in refusal(example=4)
    assert "example: can't be combined with all" in refusal(example=1, all=True)
    assert str(tmp_path) in refusal(cache=tmp_path)
    assert refusal(cache=tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"
    (tmp_path / "data.jsonl").write_text("{}")
    assert refusal(cache=tmp_path / "data.jsonl") == f"{tmp_path / 'data.jsonl'}: a file, not a token cache"
    assert "html: " in refusal(html=tmp_path / "nowhere" / "page.html")
    broken = tmp_path / "broken"
    shutil.copytree(cache, broken)
    manifest = json.loads((find_cache(broken) / "manifest.json").read_text())
    del manifest["dtype"]
    (find_cache(broken) / "manifest.json").write_text(json.dumps(manifest))
    assert "dtype: missing" in refusal(cache=broken)
    for other in ("<f8", "<u4", 2, None):
        (find_cache(broken) / "manifest.json").write_text(json.dumps(manifest | {"dtype": other}))
        assert "manifest.json: dtype: " in refusal(cache=broken)


def test_a_run_folder_shows_its_token_cache(cache: Path, tmp_path: Path) -> None:
    run, notes = tmp_path / "run", []
    run.mkdir()
    shutil.copytree(cache, run / "data")
    settings = TrainSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="moved-since")
    write_settings(run, settings)
    shown = inspect(InspectSettings(cache=run, all=True), notes.append)
    assert [example.index for example in shown.examples] == [0, 1, 2, 3]
    assert [note.text for note in notes] == [f"{run} is a run folder; its token cache is {run / 'data'}"]
    shutil.rmtree(run / "data")
    write_settings(run, settings.model_copy(update={"preprocessed_path": cache}))
    done = t5tune_in_fork("inspect", run)
    assert done.code == 0, done.stderr
    assert f"{run} is a run folder; its token cache is {cache}" in done.stderr
    assert "Human: Hi Assistant:" in done.stdout
    write_settings(run, settings)
    with pytest.raises(DataError, match=f"{run / 'data'}: no such folder"):
        inspect(InspectSettings(cache=run))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("languages") / "pairs.csv"
    rows = [f"We have {number} hats,Roguereko {number} akãngao" for number in range(40)]
    path.write_text("\n".join(["en,gn", *rows]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byt5")
    write_config(folder, tokenizer_class="ByT5Tokenizer")
    (folder / "config.json").write_text(json.dumps({**KNOWN_CONFIGS["google/byt5-small"], "vocab_size": 384}))
    return folder


COLUMNS = ("--source-column", "en", "--target-column", "gn")


def test_models_are_compared_on_data_without_a_cache(pairs: Path, byt5: Path, tmp_path: Path) -> None:
    command = ("inspect", "--model-name-or-path", "pocket", byt5, "--data-path", pairs, *COLUMNS)
    done = t5tune_in_fork(*command, "--json")
    english, pocket, bytes_of_english, of_bytes = json.loads(done.stdout)["splits"]
    assert "read all records: 40" in done.stderr
    texts = [line.split(",")[1] for line in pairs.read_text("utf-8").splitlines()[1:]]
    assert of_bytes["tokens_per_character"] == pytest.approx(
        len("".join(texts).encode()) / len("".join(texts)), abs=1e-4
    )
    assert (of_bytes["vocabulary_size"], of_bytes["unknown"]) == (384, {})
    assert [pocket[key] for key in ("side", "texts", "unknown")] == ["targets", 40, {"ã": 40}]
    assert [english[key] for key in ("side", "texts", "unknown")] == ["sources", 40, {}]
    assert bytes_of_english["tokens_per_character"] == 1
    shown = t5tune_in_fork(*command, env={"COLUMNS": "40"}).stdout.splitlines()
    assert shown[0].split() == ["model", "texts", "tokens/word", "tokens/character", "unknown"]
    ratios = [f"{pocket[f'tokens_per_{unit}']:.2f}" for unit in ("word", "character")]
    assert shown[2].split() == ["pocket", "targets", "(40)", *ratios, "40"]
    assert f"{byt5}, 384 tokens, targets (40): {'│'.join(of_bytes['pieces'])}" in shown
    assert "  unknown: ã 40" in shown
    page = tmp_path / "page.html"
    assert t5tune_in_fork(*command, "--html", page).stdout == f"{page}\n"
    assert "<td>ã 40</td>" in page.read_text("utf-8")
    assert html.escape("│".join(of_bytes["pieces"])) in page.read_text("utf-8")


def test_only_the_first_records_of_much_data_are_read(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", 10_000)
    values = {"model_name_or_path": "pocket", "data_path": str(pairs), "source_column": "en", "target_column": "gn"}
    notes: list[Event] = []
    split, _ = inspect(InspectSettings(**values), notes.append).splits
    assert 0 < split.texts < 40
    assert notes == [Note(f"read only the first records: {split.texts}")]


def test_all_texts_of_a_conversation_are_split(tmp_path: Path, byt5: Path) -> None:
    texts = (("system", "Be"), ("user", "Hi"), ("assistant", "Yes"))
    turns = [{"role": role, "content": text} for role, text in texts]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": turns}))
    sources, targets = inspect(InspectSettings(model_name_or_path=byt5, data_path=tmp_path / "data.jsonl")).splits
    assert (sources.texts, sources.tokens_per_word, sources.pieces) == (2, 2, ["B", "e"])
    assert (targets.texts, targets.tokens_per_word, targets.pieces) == (1, 3, ["Y", "e", "s"])


def test_statistics_show_how_the_vocabulary_of_a_cache_splits_texts(cache: Path, tmp_path: Path) -> None:
    done = t5tune_in_fork("inspect", cache, "--stats", "--json")
    sources, split = json.loads(done.stdout.splitlines()[-1])["splits"]
    assert (split["texts"], split["unknown"], split["pieces"][-3:]) == (4, {"猫": 1}, ["{", "x", "}"])
    assert (sources["side"], sources["texts"], sources["unknown"]) == ("sources", 4, {})
    shown = t5tune_in_fork("inspect", cache, "--stats").stdout.splitlines()
    pieces = "│".join(split["pieces"]).replace("\n", "↵")
    assert shown[-2].endswith(f": {pieces}")
    assert shown[-1] == "  unknown: 猫 1"
    inspect(InspectSettings(cache=cache, html=tmp_path / "page.html"))
    assert pieces in html.unescape((tmp_path / "page.html").read_text("utf-8"))


def test_unknown_characters_in_the_sources_of_a_cache_are_counted(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"source": "猫 and 帽", "target": "Yes"}))
    values = {"model_name_or_path": "pocket", "data_path": tmp_path / "data.jsonl", "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values))
    sources, targets = inspect(InspectSettings(cache=tmp_path / "cache", stats=True)).splits
    assert (sources.unknown, targets.unknown) == ({"\ufffd": 2}, {})


def test_raw_text_has_no_sides(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("Good morning.\n\nHow are you?")
    values = {"model_name_or_path": "pocket", "data_path": tmp_path / "data.txt", "objective": "span-corruption"}
    (split,) = inspect(InspectSettings(**values)).splits
    assert split.side == "texts"


def test_only_tokenizers_and_configs_are_downloaded(pairs: Path, byt5: Path, tmp_path: Path) -> None:
    pocket = REPOSITORY / "t5tune" / "pocket"
    with serve_hub(tmp_path / "home") as hub:
        hub.add("model", "some/t5", pocket)
        command = ("inspect", "--model-name-or-path", "some/t5", byt5, "--data-path", pairs, *COLUMNS, "--json")
        done = t5tune_in_fork(*command, env=hub.environment)
        assert hub.count_downloads("tokenizer.json") == hub.count_downloads("config.json") == 1
        assert hub.count_downloads("model.safetensors") == 0
    assert [split["model"] for split in json.loads(done.stdout)["splits"]] == ["some/t5"] * 2 + [str(byt5)] * 2
