"""What has to fit together between the sections of a run: each check names both values and a fix."""

from vla_foundry.config.derivation import DatasetFacts, Derived, Facts, Unavailable
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.experiment import TrainExperimentParams, accumulation_steps, total_steps
from vla_foundry.params.hparams import count_decay_steps


def derive_budget(params: TrainExperimentParams, facts: Facts) -> dict[str, Derived]:
    """Return the budget in samples that `num_epochs` means.

    Raises:
        ValueError: there is no budget, or there are two that disagree.
    """
    if params.num_epochs is None:
        if params.total_train_samples is None:
            raise ValueError("There is no budget. Give --total_train_samples N or --num_epochs N.")
        return {}
    counts = [dataset.num_samples for dataset in facts.datasets]
    missing = [count for count in counts if isinstance(count, Unavailable)]
    if missing:
        # an explicit budget needs no manifest; whether both agree is seen when training starts
        known = params.total_train_samples is not None
        return {} if known else {"total_train_samples": Derived(missing[0], "num_epochs")}
    epoch = sum(count for count in counts if isinstance(count, int))
    samples = params.num_epochs * epoch
    if params.total_train_samples not in (None, samples):
        raise ValueError(
            f"total_train_samples ({params.total_train_samples}) and num_epochs ({params.num_epochs}) x {epoch} "
            f"samples = {samples} disagree. Give one of them."
        )
    if params.total_train_samples is not None:
        return {}
    return {"total_train_samples": Derived(samples, f"num_epochs x {epoch} samples in data.dataset_manifest")}


def check_budget(params: TrainExperimentParams, facts: Facts) -> list[str]:
    """Check that the budget makes steps, and how it divides.

    Raises:
        ValueError: it is less than one step, the batch does not divide, or the schedule does not fit.
    """
    accumulation_steps(params, facts.world_size)
    if params.total_train_samples is None:
        return []
    batch = params.hparams.global_batch_size
    steps = total_steps(params)
    if steps == 0:
        raise ValueError(
            f"total_train_samples ({params.total_train_samples}) is less than one global batch "
            f"(hparams.global_batch_size {batch}). Raise the one or lower the other."
        )
    count_decay_steps(params.hparams, steps)
    notices = []
    left = params.total_train_samples - steps * batch
    if left:
        notices.append(
            f"{left} of total_train_samples ({params.total_train_samples}) do not fill a global batch of {batch} and "
            f"are left over: {steps} steps."
        )
    if params.num_checkpoints > steps:
        notices.append(f"num_checkpoints ({params.num_checkpoints}) is more than the {steps} steps: one each step.")
    return notices


def check_data(params: TrainExperimentParams, facts: Facts) -> None:
    """Check that there is enough data, and that its sequences and the model's fit.

    Raises:
        ValueError: it is not so.
    """
    data = params.data
    if not data.allow_multiple_epochs:
        _check_enough(params, facts)
    _check_seq_len(data, params, facts)


def _check_enough(params: TrainExperimentParams, facts: Facts) -> None:
    data = params.data
    budget = params.total_train_samples
    if budget is None or len(data.dataset_weighting) != len(facts.datasets):
        return
    used = budget // params.hparams.global_batch_size * params.hparams.global_batch_size
    total_weight = sum(data.dataset_weighting)
    for dataset, weight in zip(facts.datasets, data.dataset_weighting, strict=True):
        share = used * weight / total_weight
        # a share is kept to within one sample
        if isinstance(dataset.num_samples, int) and share > dataset.num_samples + 1:
            part = "" if len(facts.datasets) == 1 else f"its share {round(share)} of "
            raise ValueError(
                f"{part}total_train_samples ({budget}) is more than the {dataset.num_samples} samples of "
                f"{dataset.manifest}. Set --data.allow_multiple_epochs true, or lower the budget."
            )


def _check_seq_len(data: DataParams, params: TrainExperimentParams, facts: Facts) -> None:
    longest = params.model.token_limits().max_seq_len
    if longest is not None and data.seq_len > longest:
        raise ValueError(
            f"data.seq_len ({data.seq_len}) is more than model.max_seq_len ({longest}). "
            f"Use --data.seq_len {longest}, or raise model.max_seq_len."
        )
    for dataset in (*facts.datasets, *facts.val_datasets):
        made = dataset.provenance.get("seq_len")
        if isinstance(made, int) and made < data.seq_len:
            raise ValueError(
                f"data.seq_len ({data.seq_len}) is more than the sequences of {dataset.manifest} hold ({made}). "
                f"Use --data.seq_len {made}, or preprocess the data again."
            )


def check_tokens(params: TrainExperimentParams, facts: Facts) -> None:
    """Check that the model has a row for every token of its data.

    Raises:
        ValueError: it has not, or datasets were made with tokenizers of different sizes.
    """
    sizes: dict[str, int] = {}
    if facts.tokenizer is not None:
        sizes[f"data.tokenizer {facts.tokenizer.name}"] = facts.tokenizer.vocab_size
    for dataset in (*facts.datasets, *facts.val_datasets):
        size = _dataset_vocab_size(dataset)
        if size is not None:
            sizes[dataset.manifest] = size
    if not sizes:
        return
    source, size = max(sizes.items(), key=lambda item: item[1])
    other, smallest = min(sizes.items(), key=lambda item: item[1])
    if size != smallest:
        raise ValueError(
            f"The tokenizers differ: {source} has {size} tokens and {other} has {smallest}. "
            "Use data of one tokenizer, and name it with data.tokenizer."
        )
    vocab_size = params.model.token_limits().vocab_size
    if vocab_size is not None and size > vocab_size:
        raise ValueError(
            f"model.vocab_size ({vocab_size}) is less than the {size} tokens of {source}. "
            f"Use --model.vocab_size {size} or more."
        )


def _dataset_vocab_size(dataset: DatasetFacts) -> int | None:
    if dataset.tokenizer is not None:
        return dataset.tokenizer.vocab_size
    size = dataset.provenance.get("vocab_size")
    return size if isinstance(size, int) else None
