"""Prepare a token cache: a folder with a cache for each dataset. All caches have the same tokenizer.

manifest, facts = prepare_datasets(plan, report)
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import find_base, pin_base
from t5tune.checkpoints.training_data import DatasetTraining, TrainingData, read_training_data, write_training_data
from t5tune.data.caches.cache import Cache, open_cache
from t5tune.data.caches.examples import Dataset, Examples, describe_shares, find_missing_labels
from t5tune.data.caches.manifest import CONTENT_COUNTS, COUNTS, read_manifest
from t5tune.data.caches.prepared import check_datasets, is_prepared, list_caches, open_examples, read_examples_manifest
from t5tune.data.labels import LabelTask
from t5tune.data.reading.files import STDIN, find_encodings
from t5tune.data.reading.remote_files import hide_query
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.data.tokens.vocabulary import ExtendedTokenizer
from t5tune.errors import DataError, T5TuneError, naming_settings, to_t5tune_error
from t5tune.file_names import MIXTURE_FILE, REJECTED_FILE, TEMPLATE_FILE
from t5tune.io.atomic import remove_abandoned, write_file, write_folder_atomically, write_json
from t5tune.io.reasons import join_first
from t5tune.io.yaml_file import to_yaml
from t5tune.preparing.cache_files import CacheSource, encode_cache, write_cache
from t5tune.preparing.cache_reuse import find_reusable, make_resume_error
from t5tune.preparing.data_problems import check_rejected, report_problems
from t5tune.preparing.dataset import (
    OpenedDataset,
    choose_vocabulary,
    describe_source,
    open_dataset,
    report_template,
)
from t5tune.preparing.parts.parts import Parts
from t5tune.preparing.parts.shard import find_shard
from t5tune.preparing.plan import PreparePlan
from t5tune.preparing.record_checks import keep_rejected
from t5tune.progress import Note, Report
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.shard import Shard

COUNTED = {*CONTENT_COUNTS, "held_out_examples", "share", "examples_per_epoch"}  # in mixture.json


def prepare_datasets(plan: PreparePlan, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the token cache of the datasets, or a part of it, unless it is up to date.

    The folder is replaced as a whole; caches in it that are up to date are kept.

    Returns:
        The manifest of the token cache, and facts about this call for the result.

    Raises:
        T5TuneError: the disk is full, or a file can't be read or written.
        DataError, ModelError, SettingsError: see `prepare`.
    """
    try:
        with naming_settings(data_path=plan.origin.setting):
            return _prepare_datasets(plan, report)
    except OSError as error:
        error.filename = error.filename or str(plan.output_dir)
        raise to_t5tune_error(error) from error


def _prepare_datasets(plan: PreparePlan, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    plan = replace(plan, base=pin_base(plan.base, report))  # once for all datasets
    job = _Job(plan, report, _keep_name(plan))
    shard = find_shard(plan.shard) if plan.shard is not None else None
    facts: dict[str, Any] = {"up_to_date": False, "shard": shard and str(shard), "joined": None, "held_out": None}
    is_divided = shard is not None or plan.join
    sources = job.describe_sources(is_divided)
    inputs = {name: source.inputs for name, source in sources.items()}
    reusable = find_reusable(job.folder, inputs, [*job.datasets], plan.origin.checkpoint)
    for name, manifest in reusable.items():
        _check_rejected_before(sources[name], manifest, job.folder / name)
    parts = Parts(job.folder, {name: source for name, source in sources.items() if name not in reusable})
    if (examples := job.open_up_to_date(reusable)) is not None:
        if is_divided:
            Parts(job.folder, sources).remove()
        else:
            remove_abandoned(job.folder)
        facts |= {"up_to_date": True, "joined": is_divided or None, **_count_examples(examples)}
        return examples.manifest | examples.count_prepared(), facts
    if parts.sources and is_divided:
        written = job.prepare_part(parts, shard, sources, reusable)
        facts["joined"] = isinstance(written, Examples)
        if not isinstance(written, Examples):
            return written, facts
        examples = written
    else:
        facts["joined"] = is_divided or None  # nothing has to be encoded
        if parts.list_complete():
            words = "parts that prepare --shard left; delete the folder if you no longer need them"
            report(Note(f"{parts.folder}: {words}"))
        examples = job.write(sources, reusable, job.encode, is_shared=is_divided)
    for name, source in sources.items():
        if name not in reusable:
            source.checks.rejected_file.unlink(missing_ok=True)  # of an earlier attempt
            cache_manifest = read_manifest(job.folder / name)
            report_template(source, cache_manifest, report)
            report_problems(cache_manifest, job.folder / name, report)
    if plan.origin.run is None:
        training, held_out = examples.split_as_prepared()
        missing = find_missing_labels(load_tokenizer(examples.tokenizer_folder), training, held_out) if held_out else []
        for note in [*describe_shares(training), *missing]:
            report(note)
    return examples.manifest | examples.count_prepared(), {**facts, **_count_examples(examples)}


@dataclass(frozen=True)
class _Job:
    plan: PreparePlan
    report: Report
    datasets: Mapping[str, DatasetSpec]

    @property
    def folder(self) -> Path:
        return self.plan.output_dir

    @property
    def given(self) -> dict[str, Path]:
        """The token caches among the datasets."""
        return {name: dataset.cache for name, dataset in self.datasets.items() if dataset.cache is not None}

    @cached_property
    def _given_caches(self) -> dict[str, Cache]:
        return {name: open_cache(cache) for name, cache in self.given.items()}

    def describe_sources(self, is_divided: bool) -> dict[str, CacheSource]:
        """Open the datasets that aren't caches, and choose the common vocabulary and each dataset's template."""
        given = self.given
        opened: dict[str, OpenedDataset] = {}
        for name, dataset in self.datasets.items():
            if name not in given:
                if len(self.datasets) > 1:
                    self.report(Note(f"dataset {name}: {join_first([*map(hide_query, dataset.path)])}"))
                opened[name] = open_dataset(self.plan, dataset, self.report)
        if not opened:
            return {}
        base = find_base(self.plan.base, report=self.report)
        labels = self._find_trained_labels()
        vocabulary = self._choose_vocabulary(base, given, opened)
        sources = {}
        for name, each in opened.items():
            sources[name] = describe_source(self._select(name), each, base, vocabulary, labels)
            if is_divided:
                each.sample.clear()  # a part reads its own records
        return sources

    def _find_trained_labels(self) -> LabelTask | None:
        """Find the labels of the model that the data is to evaluate."""
        origin = self.plan.origin
        if not origin.is_evaluation or origin.tokenizer_source is None:
            return None
        trained = read_training_data(origin.tokenizer_source)
        return None if trained is None else trained.labels

    def _select(self, name: str) -> PreparePlan:
        """Return the plan for one dataset, which takes its template from the dataset of the same name."""
        origin, source = self.plan.origin, self.plan.origin.tokenizer_source
        if source is not None and is_prepared(source):
            source = list_caches(source).get(name, source)
        return replace(self.plan, origin=replace(origin, tokenizer_source=source))

    def _choose_vocabulary(
        self, base: Path, given: Mapping[str, Path], opened: Mapping[str, OpenedDataset]
    ) -> ExtendedTokenizer:
        """Take the tokenizer of a given token cache, or extend the base's with the tokens that all datasets need."""
        source = next(iter(given.values()), self.plan.origin.tokenizer_source)
        return choose_vocabulary(
            self.plan, base, source, chain.from_iterable(each.parse_sample() for each in opened.values())
        )

    def open_up_to_date(self, reusable: Mapping[str, dict[str, Any]]) -> Examples | None:
        """Open the examples in the folder if all of its contents are up to date."""
        if reusable.keys() | self.given.keys() != self.datasets.keys() or not is_prepared(self.folder):
            return None
        try:
            before, examples = read_examples_manifest(self.folder), self._open_examples(self.folder, reusable)
        except DataError:  # mixture.json or a cache is broken
            return None
        now = self._describe(examples)
        if self.plan.origin.checkpoint is not None:  # the run refuses a different split later, and its files stay
            before, now = _drop_counts(before), _drop_counts(now)
        return examples if now == before else None

    def _describe(self, examples: Examples) -> dict[str, Any]:
        """Describe the examples that are trained on for mixture.json, and count those that aren't."""
        training, held_out = examples.split_as_prepared()
        if (split := self.plan.origin.run_split) is not None:
            training, held_out = examples.split(split.eval_fraction, split.split_seed)
        num_held_out = 0 if held_out is None else len(held_out)
        return training.manifest | {"held_out_examples": num_held_out}

    def _open_examples(self, folder: Path, manifests: Mapping[str, dict[str, Any]]) -> Examples:
        """Open the examples of all datasets.

        Args:
            folder: contains the caches that aren't given, whose files have been verified or just written.
            manifests: of these caches.
        """
        given = self._given_caches
        datasets = [
            # a cache that was written here has num_data already
            Dataset(name, given[name], dataset.weight, dataset.num_data)
            if name in given
            else Dataset(name, Cache(folder / name, manifests[name]), dataset.weight)
            for name, dataset in self.datasets.items()
        ]
        check_datasets(datasets, self.plan.origin.setting)
        return Examples(folder, datasets, self.plan.mixing).limit_training().map_labels()

    def write(
        self,
        sources: Mapping[str, CacheSource],
        reusable: Mapping[str, dict[str, Any]],
        write_dataset: Callable[[str, CacheSource, Path], dict[str, Any]],
        is_shared: bool = False,
    ) -> Examples:
        """Write the folder as a whole, with links to the files of caches that are up to date."""
        _check_given_caches(self.folder, self.given)
        manifests = dict(reusable)
        with write_folder_atomically(self.folder, is_shared=is_shared) as staged:
            for name, source in sources.items():
                if name in reusable:
                    shutil.copytree(self.folder / name, staged / name, copy_function=_link)
                    continue
                (staged / name).mkdir()
                with keep_rejected(staged / name, source.checks.rejected_file):
                    manifests[name] = write_dataset(name, source, staged / name)
            examples = self._open_examples(staged, manifests)
            self._check_trained_on(examples)
            training, _ = examples.split_as_prepared()
            write_file(staged / TEMPLATE_FILE, to_yaml(dict(vars(examples.main.cache.template))).encode())
            write_training_data(staged, _join_training_data(training))
            write_json(staged / MIXTURE_FILE, self._describe(examples))
        return self._open_examples(self.folder, manifests)

    def _check_trained_on(self, examples: Examples) -> None:
        """Check that a run that has a checkpoint keeps its examples."""
        if (checkpoint := self.plan.origin.checkpoint) is None or not is_prepared(self.folder):
            return
        with suppress(DataError):  # a cache is broken: it is written again
            before = open_examples(self.folder)
            then, now = ([each.cache.whole.identify() for each in found.datasets] for found in (before, examples))
            if then != now:
                raise make_resume_error(checkpoint, ["data: not the examples that the run was trained on"])

    def encode(self, name: str, source: CacheSource, staged: Path) -> dict[str, Any]:
        """Write the cache of a dataset."""
        manifest = write_cache(staged, source, lambda staged: encode_cache(staged, source, source.records, self.report))
        if STDIN in source.files:  # its first letters beyond ASCII may come after the sample
            find_encodings([STDIN], source.dataset.encoding, source.stdin, self.report)
        return manifest

    def prepare_part(
        self,
        parts: Parts,
        shard: Shard | None,
        sources: Mapping[str, CacheSource],
        reusable: Mapping[str, dict[str, Any]],
    ) -> Examples | dict[str, Any]:
        """Write a part, unless parts are only to be joined, and join the parts if all are complete.

        Returns:
            The examples if the parts are joined; otherwise the manifest of the part.
        """
        try:
            count = _find_count(parts, shard)
            written = [] if shard is None else parts.write(shard, self.report)
            if not (missing := parts.list_missing(count)):

                def join(name: str, source: CacheSource, staged: Path) -> dict[str, Any]:
                    return parts.join(name, count, staged, self.report)

                examples = self.write(sources, reusable, join, is_shared=True)
            elif (joined := self.find_joined(sources)) is not None:  # this part was one of them already
                examples = joined
            else:
                how = "the process that completes the last part joins them"
                shards = join_first(list(map(str, missing)))
                self.report(Note(f"part {shard} is complete in {parts.folder}; still missing: {shards}; {how}"))
                return {**written[0], **{name: sum(each[name] for each in written) for name in COUNTS}}
        except (T5TuneError, OSError):
            if (joined := self.find_joined(sources)) is None:
                raise
            examples = joined  # another process joined the parts and deleted them
        parts.remove()
        return examples

    def find_joined(self, sources: Mapping[str, CacheSource]) -> Examples | None:
        """Open the examples in the folder if another process has joined the parts meanwhile."""
        inputs = {name: source.inputs for name, source in sources.items()}
        return self.open_up_to_date(find_reusable(self.folder, inputs, [*self.datasets], checkpoint=None))


def _keep_name(plan: PreparePlan) -> Mapping[str, DatasetSpec]:
    """Name the datasets; a run's only dataset keeps its name if its files have moved."""
    folder, datasets = plan.output_dir, plan.datasets
    has_run = plan.origin.checkpoint is not None
    if has_run and len(datasets) == 1 and is_prepared(folder) and len(before := list_caches(folder)) == 1:
        datasets = [datasets[0].model_copy(update={"name": next(iter(before))})]
    return {each.name: each for each in datasets}


def _drop_counts(description: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from the contents of mixture.json what depends on the held-out examples."""
    datasets = [{key: value for key, value in each.items() if key not in COUNTED} for each in description["datasets"]]
    return {key: value for key, value in description.items() if key not in COUNTED} | {"datasets": datasets}


def _count_examples(examples: Examples) -> dict[str, Any]:
    _, held_out = examples.split_as_prepared()
    datasets = {each.name: len(each.cache) for each in examples.datasets} if examples.are_several else None
    return {"datasets": datasets, "held_out": None if held_out is None else len(held_out)}


def _link(source: str, target: str) -> None:
    """Link a file; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _check_rejected_before(source: CacheSource, manifest: dict[str, Any], cache: Path) -> None:
    """Check the rejected records of an existing cache, since max_rejected_fraction may be different now."""
    rejected = Counter(manifest["rejected_by_reason"])
    num_records = manifest["conversations"] + rejected.total()
    allowed = source.checks.max_rejected_fraction
    check_rejected(rejected, num_records, allowed, source.checks.data, cache / REJECTED_FILE)


def _find_count(parts: Parts, shard: Shard | None) -> int:
    """Check the existing parts, and return the number of parts."""
    if shard is not None:
        parts.check(shard.count)
        return shard.count
    complete = [*parts.list_complete()]
    if not complete:
        hint = "prepare each part with --shard I/N first"
        raise DataError(f"join: {parts.folder}: contains no complete parts", hint=hint)
    parts.check(count := complete[0].count)
    if missing := parts.list_missing(count):
        problem = f"join: {parts.folder}: still missing: {join_first(list(map(str, missing)))}"
        raise DataError(problem, hint=f"prepare each of them, for example with --shard {missing[0]}")
    return count


def _check_given_caches(folder: Path, given: Mapping[str, Path]) -> None:
    """Check that the output folder contains none of the given token caches, which would be deleted."""
    for cache in given.values():
        if cache.resolve().is_relative_to(folder.resolve()):
            problem = f"data: {cache}: one of the datasets, but also in the output folder, which is replaced as a whole"
            raise DataError(problem, hint="choose another output folder")


def _join_training_data(mixture: Examples) -> TrainingData:
    """Describe how the examples of all datasets were made; the top level describes the main dataset."""
    made = [read_training_data(dataset.cache.folder) for dataset in mixture.datasets]
    datasets = [
        DatasetTraining(
            name=dataset.name,
            share=rates["share"],
            conversation_template=dict(vars(dataset.cache.template)),
            has_earlier_turns=own.has_earlier_turns,
            **own.list_reading(),
        )
        for dataset, own, rates in zip(mixture.datasets, made, mixture.describe_rates(), strict=True)
        if own is not None
    ]
    main = made[mixture.datasets.index(mixture.main)]
    assert main is not None, "prepare has written it"
    return replace(main, datasets=datasets if mixture.are_several else [], labels=mixture.label_task)
