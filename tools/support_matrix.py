"""docs/support.md: the tests of each model type and platform, and the reasons for missing tests.

`COLUMNS` and `PLATFORMS` are the facts; which tools read a merged checkpoint is in t5tune/families.
"""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from t5tune.families import CONVERTERS, FAMILIES, Family
from tools import REPOSITORY

FAMILIES_TEST = "tests/end_to_end/test_families.py"
OTHER_TOOLS_TEST = "tests/end_to_end/test_other_tools.py"
TRAIN_TESTS = "tests/commands/train"
KERNEL_TESTS = "tests/model/kernels"
SHARED_MEMORY_FILE = REPOSITORY / "tests/golden/shared_memory.json"
SHORT_CHAIN = f"{FAMILIES_TEST}::test_each_family_trains_exports_merges_and_replies"

GEMMAS = ("t5gemma", "t5gemma2")
GEMMA_BASES = {"t5gemma": "t5gemma-9b-2b", "t5gemma2": "t5gemma2"}  # key -> its base in tests/model

State = Literal["yes", "no", "untested"]


@dataclass(frozen=True)
class Column:
    """A column of the matrix, and the section that its cells link to.

    Args:
        text: the tested behavior, or why it isn't tested.
        tests: tests of a model type: `{key}` is its key in FAMILIES, `{architecture}` the key for all types
            of its architecture.
        other_tests: tests that replace `tests` for some model types, by key.
        more_tests: tests of only some model types, mentioned in the text.
        state: the state of model types that aren't in `reasons`.
        reasons: why the tool can't read a model type, by its key; t5tune/families lists the tools of each model type.
    """

    text: str
    tests: tuple[str, ...] = ()
    other_tests: dict[str, tuple[str, ...]] = field(default_factory=dict)
    more_tests: tuple[str, ...] = ()
    state: State = "yes"
    reasons: dict[str, str] = field(default_factory=dict)


def get_architecture(family: Family) -> tuple[str, str, bool]:
    """Return the facts that determine a model's layers: then only tokenizers and numbers of rows differ."""
    return family.model_type, family.feed_forward, family.tied


def of_gemma(*tests: str) -> dict[str, tuple[str, ...]]:
    """Return the tests of T5Gemma and T5Gemma 2; `{base}` is the name of its base in tests/model."""
    return {
        key: tuple(f"tests/{test}".format(key=key, base=base) for test in tests) for key, base in GEMMA_BASES.items()
    }


ARCHITECTURES = {get_architecture(family): key for key, family in FAMILIES.items()}

COLUMNS = {
    "prepare": Column(
        "A conversation becomes token ids that decode to the original text, with newlines, braces and non-ASCII "
        "letters as far as the tokenizer has them. The tokenizer is of the published kind: SentencePiece, with byte "
        "fallback, byte-level BPE, or bytes.",
        (f"{SHORT_CHAIN}[{{key}} lora]",),
        of_gemma("end_to_end/test_gemma.py::test_the_data_has_the_special_tokens_of_gemma[{key} lora]"),
        more_tests=(
            "tests/commands/prepare/test_added_tokens.py::test_byt5_gets_no_added_tokens_and_decodes_exactly",
            f"{FAMILIES_TEST}::test_the_added_tokens_of_fastchat_t5_keep_their_ids",
        ),
    ),
    "LoRA": Column(
        "A run on all linear layers changes the logits, and stock PEFT computes equal logits from the run's adapter. "
        "The variants (DoRA, rsLoRA, PiSSA, …) are tested with the architectures of T5, Flan-T5 and T5Gemma.",
        (f"{SHORT_CHAIN}[{{key}} lora]",),
        of_gemma(
            "end_to_end/test_gemma.py::test_stock_peft_loads_the_adapter_without_touching_the_vision_tower[{key} lora]"
        ),
        more_tests=("tests/end_to_end/test_lora_variants.py::test_live_model_saved_adapter_and_merged_checkpoint_agree",),
    ),
    "QLoRA": Column(
        "The same with `--q-lora`, in NF4 with double quantization. FP4, int8 and LoftQ are tested with Flan-T5's "
        "architecture, int8 and LoftQ also with T5Gemma and T5Gemma 2.",
        (f"{SHORT_CHAIN}[{{key}} q_lora]",),
        of_gemma("end_to_end/test_gemma.py::test_only_the_layers_of_the_text_are_quantized[{key} q_lora]"),
        more_tests=(
            "tests/end_to_end/test_lora_variants.py::"
            "test_a_loaded_qlora_adapter_has_the_loss_of_training",
        ),
    ),
    "full": Column(
        "`--train-mode full` changes every tensor (in T5Gemma 2, every tensor for text), and stock transformers "
        "computes t5tune's logits from the run folder.",
        (f"{FAMILIES_TEST}::test_each_family_trains_in_full[{{key}}]",),
        of_gemma(
            "end_to_end/test_gemma.py::test_a_full_run_resumes_and_ends_with_a_complete_checkpoint[{key}]"
        ),
    ),
    "labels": Column(
        "The encoder learns labels of texts or words (`--objective classify`, `regress`, `tag`), and stock "
        "transformers computes the loss from the merged checkpoint. With T5, Flan-T5, mT5, umT5 and T5Gemma, all "
        "gradients of packed rows equal the stock class's, and sentence-transformers computes the logits (`merge --to "
        "sentence-transformers`). `serve` is tested with Flan-T5's architecture.",
        (f"{FAMILIES_TEST}::test_each_familys_encoder_learns_to_tag_words[{{key}}]",),
        {"t5gemma": ("tests/merging/test_labels.py::test_stock_peft_and_our_loader_give_the_same_logits[t5gemma]",)},
        more_tests=(
            "tests/model/test_labels.py::test_a_packed_row_has_the_gradients_of_the_stock_class[flan-t5-tag]",
            "tests/merging/test_labels.py::test_sentence_transformers_encodes_texts_to_logits",
            "tests/serving/test_labels.py::test_the_labels_are_those_that_evaluate_predicts",
        ),
        reasons=dict.fromkeys(
            ("longt5", "t5gemma2"), "transformers has no class that labels tokens with its encoder alone."
        ),
    ),
    "packed": Column(
        "All gradients of a packed row equal the padded batch's. There is a test for each architecture; the tests of "
        "LoRA above train packed rows of every model type.",
        ("tests/model/attention/test_packing.py::test_all_gradients_equal_those_of_the_padded_batch[{architecture}]",),
        {
            "longt5": tuple(
                "tests/model/attention/test_longt5.py::test_packed_padded_and_single_examples_have_the_same_gradients"
                f"[None-{kind}]"
                for kind in ("local", "transient-global")
            ),
            **of_gemma(
                "model/attention/test_gemma.py::test_packed_rows_equal_a_padded_batch_and_single_examples[{base}-None]"
            ),
        },
    ),
    "ZeRO-3": Column(
        "Two processes that share the base have the same losses and gradient norms as one process. There is a test for "
        "each architecture. ZeRO-3 with `--q-lora`, with `--train-mode full` and resuming are tested with Flan-T5's "
        "architecture; `--q-lora` and `--train-mode full` also with T5Gemma and T5Gemma 2. `make families` tests "
        "ZeRO-3 with `--q-lora` and resuming with each model type.",
        (
            f"{FAMILIES_TEST}::test_each_architecture_has_the_losses_of_one_process_under_zero3[{{architecture}}]",
        ),
        of_gemma("end_to_end/test_gemma.py::test_two_ranks_have_the_losses_of_one_process[{key}-ZeRO-3]"),
        more_tests=(
            f"{TRAIN_TESTS}/test_ranks.py::test_deepspeed_stages_reduce_the_loss_and_save_the_fp32_masters[way0]",
            "tests/end_to_end/test_full_training.py::test_full_training_gives_the_same_weights_under_zero3",
            f"{TRAIN_TESTS}/test_ranks.py::test_two_ranks_of_zero3_resume_to_the_same_bits",
        ),
    ),
    "merge": Column(
        "Stock transformers 5 computes the logits of base and adapter from the merged checkpoint, and `chat` gives the "
        "same reply. After QLoRA, t5tune and stock transformers compute the same logits.",
        (f"{SHORT_CHAIN}[{{key}} lora]", f"{SHORT_CHAIN}[{{key}} q_lora]"),
        of_gemma(
            "end_to_end/test_gemma.py::test_stock_transformers_has_the_logits_of_the_merged_checkpoint[{key} lora]",
            "end_to_end/test_gemma.py::test_stock_transformers_has_the_logits_of_the_merged_checkpoint[{key} q_lora]",
        ),
    ),
    "trim": Column(
        "Stock transformers computes the same bits from a base with fewer embedding rows: hidden states, and the "
        "logits of the rows that were kept. Each token has its own row.",
        ("tests/commands/trim/test_trim.py::test_each_family_computes_the_same_with_fewer_rows[{key}]",),
        more_tests=("tests/commands/trim/test_trim.py::test_all_commands_take_a_trimmed_base",),
        reasons={"byt5": "Its tokens are bytes; there is nothing to trim."},
    ),
    "transformers 4": Column(
        "transformers 4 computes t5tune's logits and token ids from a merged checkpoint. These tests are skipped "
        "unless there is an environment with transformers 4; `make compatibility` creates it.",
        (f"{FAMILIES_TEST}::test_transformers_4_has_the_logits_and_ids_of_merged_models[{{key}} lora]",),
        more_tests=(f"{OTHER_TOOLS_TEST}::test_transformers_4_gives_the_token_ids_of_the_adapters_tokenizer",),
        reasons=dict.fromkeys(GEMMAS, "Its merged checkpoints need transformers 5."),
    ),
    "CTranslate2": Column(
        "`merge --to ctranslate2` gives the greedy replies of the merged model.",
        (f"{FAMILIES_TEST}::test_ctranslate2_gives_the_replies_of_the_merged_model[{{key}} lora]",),
        reasons={
            "longt5": "CTranslate2 doesn't support LongT5.",
            "t5gemma": "CTranslate2 4.8.5 computes it without its soft caps.",
            "t5gemma2": "CTranslate2 4.8.5 converts it, but its log-probabilities differ from transformers' "
            "(by 0.6 for a random model of one layer), and it fails if a text is longer than the window.",
        },
    ),
    "ONNX": Column(
        "`merge --to onnx` gives the greedy replies of the merged model in onnxruntime. `make browser` compares the "
        "replies of `pocket` in Chromium, with transformers.js.",
        (f"{FAMILIES_TEST}::test_onnx_gives_the_replies_of_the_merged_model[{{key}} lora]",),
        more_tests=(
            "tests/converting/test_onnx.py::test_a_graph_has_the_logits_of_stock_transformers[mt5]",
            "tests/converting/test_onnx_page.py::test_the_page_gives_the_replies_of_chat",
        ),
        reasons={
            "byt5": "transformers.js's support of its tokenizer is untested.",
            "flan-ul2": "The graph doesn't have its activation, SiLU.",
            "longt5": "The graph doesn't have its attention over blocks.",
            **dict.fromkeys(GEMMAS, "The graph doesn't have its layers, and transformers.js doesn't know it."),
        },
    ),
    "llama.cpp": Column(
        "No test reads a GGUF file. Logits and tensors were compared once by hand, on small models with Flan-T5's "
        "vocabulary: [serving](serving.md#llamacpp) has the results and the pitfalls. A test reads the files that "
        "llama.cpp's converter reads.",
        more_tests=(
            f"{OTHER_TOOLS_TEST}::test_merge_adds_spiece_model_and_added_tokens_to_the_tokenizer",
        ),
        state="untested",
        reasons={
            "byt5": "llama.cpp has no byte-level tokenizer.",
            "codet5": "llama.cpp reads only SentencePiece tokenizers of T5 models.",
            **dict.fromkeys(
                ("mt5", "umt5"),
                "llama.cpp's tokenizer ignores byte fallback, so it reads characters without a token as unknown "
                "([issue 28862](https://github.com/ggml-org/llama.cpp/issues/28862)).",
            ),
            "flan-ul2": "llama.cpp computes GELU in every T5, whatever `config.json` says; Flan-UL2 has SiLU.",
            **dict.fromkeys(("longt5", *GEMMAS), "llama.cpp doesn't read it."),
        },
    ),
    "serve": Column(
        "Replies over HTTP, to several clients at once, equal `chat`'s: with transformers, and with CTranslate2 if it "
        "converts the model type. Adapters, added tokens, quantized bases, constraints and scores are tested with "
        "Flan-T5's architecture; constraints also with the tokenizers of fastchat-t5, T5Gemma, CodeT5 and ByT5.",
        ("tests/serving/test_families.py::test_each_family_is_served_with_the_replies_of_chat[{key}]",),
        more_tests=(
            "tests/serving/test_replies.py::test_many_clients_at_once_get_the_replies_of_chat",
            "tests/inference/test_shared_bases.py::test_a_shared_base_changes_no_bit_of_a_model",
            "tests/serving/test_constraints.py::test_constrained_replies_are_the_likeliest_allowed_tokens",
            "tests/constraints/test_grammars.py::test_a_schema_allows_compact_and_indented_json",
            "tests/serving/test_scoring.py::test_scores_are_those_of_plain_transformers",
        ),
    ),
}  # fmt: skip

PLATFORMS: dict[str, tuple[State, str, tuple[str, ...]]] = {
    "Linux, CPU, one process": ("yes", "All tests run here.", ()),
    "Linux, CPU, several processes": (
        "yes",
        "With gloo, started by `--num-processes`, torchrun and deepspeed. `pytest -m distributed` selects these tests.",
        (
            f"{TRAIN_TESTS}/test_ranks.py::test_training_runs_under_other_launchers[torchrun]",
            "tests/commands/evaluate/test_ranks.py::test_any_number_of_ranks_gives_the_same_result",
            "tests/training/test_packing.py::test_a_step_is_the_same_on_two_ranks",
        ),
    ),
    "Linux, one NVIDIA GPU": (
        "untested",
        "t5tune hasn't run on a GPU yet, so speed and memory there are estimates. Tests without GPUs run the kernels "
        "in Triton's interpreter, compile them for [six kinds of GPUs](#shared-memory), and check that a process takes "
        "a single GPU. Run `t5tune doctor` first: it trains a step of the built-in model. In a clone, "
        "`python benchmarks/gpu.py --prove --output-dir results` checks kernels, training and serving.",
        (
            f"{TRAIN_TESTS}/test_train.py::test_one_process_trains_on_one_gpu_however_many_are_visible",
            f"{KERNEL_TESTS}/test_flex_interpreter.py::test_compiled_kernels_equal_attention_in_fp64",
            f"{KERNEL_TESTS}/test_gated_gelu.py::test_outputs_and_gradients_are_those_of_the_formula",
            f"{KERNEL_TESTS}/test_flex_compilation.py::test_kernels_take_the_shared_memory_of_the_table",
        ),
    ),
    "Linux, several NVIDIA GPUs": (
        "untested",
        "As with one GPU, with NCCL in place of gloo. A test without GPUs checks that missing GPUs are refused.",
        ("tests/end_to_end/test_environments.py::test_missing_gpus_are_refused_with_the_reason",),
    ),
    "several nodes": (
        "untested",
        "Tested only as several processes on one machine, also with lost and hanging processes, with SLURM's variables "
        "but without `srun`. See [many nodes](multinode.md).",
        ("tests/reliability/test_ranks.py::test_tasks_of_srun_connect_and_stop_together",),
    ),
    "macOS": (
        "untested",
        "DeepSpeed and bitsandbytes aren't installed there, so `--deepspeed` and `--q-lora` end with an error.",
        (),
    ),
    "Windows, under WSL": ("untested", "It should run as on Linux.", ()),
    "Windows": ("no", "t5tune locks files and measures memory with `fcntl` and `resource`, which Windows lacks.", ()),
}

INTRODUCTION = (
    "The tables show the tested features for each [model type](families.md) and platform. A *yes* links to its test, "
    "*no* and *untested* to their reason."
)
HOW_IT_IS_TESTED = (
    "The tests train small random models on the CPU of a Linux machine, with the architectures and the kinds of "
    "tokenizers of the published models. They use no published weights, because no test needs a network. These model "
    "types share an architecture, and differ only in the tokenizer and the number of embedding rows:"
)
WHAT_THAT_MEANS = "Tests that don't depend on the tokenizer use one of them."
VERSIONS = (
    "t5tune needs Python 3.11 or newer. The tests run with 3.11; on 2026-12-02, they also passed with Python 3.13 and "
    "torch 2.15, built for CUDA, on a CPU (without the tests that compile kernels for a GPU). `make floors` runs them "
    "with the oldest releases of the libraries that `pyproject.toml` allows."
)
SHARED_MEMORY = (
    "Bytes of shared memory of attention's largest kernel, forward / backward, for packed rows in bf16, compiled by "
    "torch {torch} and Triton {triton}. Bold numbers don't fit on the GPU. Then "
    "`train` and `evaluate` try two stages, and one stage with smaller tiles in the backward pass. Most models have "
    "heads of 64; T5-3B and T5-11B have heads of 128, Flan-UL2 of 256."
)
EXAMPLE = f'pytest -n 0 "{FAMILIES_TEST}::test_each_family_trains_in_full[mt5]"'


def build_page() -> str:
    """Return the text of docs/support.md."""
    lines = [
        "# Support",
        "",
        *fill(INTRODUCTION),
        "",
        *build_matrix(),
        "",
        *fill(f"{HOW_IT_IS_TESTED} {'; '.join(list_shared_architectures())}. {WHAT_THAT_MEANS}"),
        "",
        "## Platforms",
        "",
        "| platform | works | evidence |",
        "|---|---|---|",
    ]
    for name, (state, text, tests) in PLATFORMS.items():
        lines.append(f"| {name} | {state} | {' '.join([text, *map(link_to_test, tests)])} |")
    lines += [
        "",
        *fill(VERSIONS),
        "",
        "### Shared memory",
        "",
        *build_shared_memory(),
        "",
        "## Tests and reasons",
        "",
        "To run one of these tests:",
        "",
        "```",
        EXAMPLE,
        "```",
    ]
    for name, column in COLUMNS.items():
        lines += build_section(name, column)
    return "\n".join([*lines, "", "This page is generated by `make generate`.", ""])


def build_matrix() -> Iterator[str]:
    """Yield the lines of the table of model types."""
    yield f"| model | {' | '.join(COLUMNS)} |"
    yield "|---" * (1 + len(COLUMNS)) + "|"
    for key, family in FAMILIES.items():
        cells = (f"[{find_state(name, key)}](#{make_anchor(name)})" for name in COLUMNS)
        yield f"| {family.name} | {' | '.join(cells)} |"


def build_shared_memory() -> Iterator[str]:
    """Yield the lines about the shared memory of kernels, which a test measured."""
    measured = json.loads(SHARED_MEMORY_FILE.read_text(encoding="utf-8"))
    yield from fill(SHARED_MEMORY.format(torch=measured["torch"], triton=measured["triton"]))
    yield ""
    yield "| GPU | compute capability | available | width of heads | torch's choice | two stages | one stage |"
    yield "|---" * 7 + "|"
    for capability, gpu in measured["gpus"].items():
        for width, sizes in gpu["sizes"].items():
            cells = [" / ".join(map(partial(mark_size, gpu["available"]), each.values())) for each in sizes.values()]
            number = f"{capability[:-1]}.{capability[-1]}"
            row = [gpu["names"], number, f"{gpu['available']:,}", width, *cells, "", ""]
            yield f"| {' | '.join(row[:7])} |"


def mark_size(available: int, size: int) -> str:
    return f"{size:,}" if size <= available else f"**{size:,}**"


def find_state(name: str, key: str) -> State:
    """Return the text of a column's cell for a model type."""
    is_supported = name in FAMILIES[key].converters if name in CONVERTERS else key not in COLUMNS[name].reasons
    if not is_supported:
        return "no"
    return COLUMNS[name].state


def list_tests(name: str, key: str) -> list[str]:
    """List the tests of a column for a model type."""
    architecture = ARCHITECTURES[get_architecture(FAMILIES[key])]
    column = COLUMNS[name]
    tests = column.other_tests.get(key, column.tests) if find_state(name, key) == "yes" else ()
    return [test.format(key=key, architecture=architecture) for test in tests]


def build_section(name: str, column: Column) -> Iterator[str]:
    """Yield the lines about a column: its tests with their parameters for each model type, and the reasons."""
    yield from ("", f"### {name}", "", *fill(column.text))
    functions: dict[str, dict[str, list[str]]] = {}  # function -> parameter -> names of model types
    reasons = []
    for key, family in FAMILIES.items():
        for test in list_tests(name, key):
            function, bracket, parameter = test.partition("[")
            functions.setdefault(function, {}).setdefault(bracket + parameter, []).append(family.name)
        if find_state(name, key) != column.state:
            reasons.append(f"{family.name}: no. {column.reasons[key]}")
    items = []
    for function, names_by_parameter in functions.items():
        parts = (f"{', '.join(names)} `{parameter}`" for parameter, names in names_by_parameter.items())
        items.append(f"{link_to_test(function)}: {'; '.join(parts)}")
    items += [*map(link_to_test, column.more_tests), *reasons]
    if items:
        yield from ("", *(f"- {item}" for item in items))


def link_to_test(test: str) -> str:
    """Link a test's name, but not its parameter, to its file."""
    function, bracket, parameter = test.partition("[")
    return f"[`{function}`](../{test.partition('::')[0]})" + (f" `{bracket}{parameter}`" if bracket else "")


def fill(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False, break_long_words=False)


def list_shared_architectures() -> Iterator[str]:
    """Yield the names of the model types that share an architecture, joined."""
    for architecture in ARCHITECTURES:
        names = [family.name for family in FAMILIES.values() if get_architecture(family) == architecture]
        if len(names) > 1:
            yield ", ".join(names)


def list_all_tests() -> list[str]:
    """List every test that the page names."""
    of_columns = [test for name in COLUMNS for key in FAMILIES for test in list_tests(name, key)]
    more = [test for column in COLUMNS.values() for test in column.more_tests]
    return list(dict.fromkeys([*of_columns, *more, *(test for *_, tests in PLATFORMS.values() for test in tests)]))


def make_anchor(heading: str) -> str:
    return heading.lower().replace(".", "").replace(" ", "-")
