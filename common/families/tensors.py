"""The tensors of a model, their shapes and their order of use, by its family and config."""

from __future__ import annotations

from common.families.table import Config, Linear, Windows, family_of


def is_tied(config: Config) -> bool:
    """Whether lm_head shares the embedding's matrix, and so has no weight of its own."""
    return bool(config.get("tie_word_embeddings", False))


def windows(config: Config) -> Windows:
    """For each layer the tokens that its attention looks back at, itself included; None for all."""
    return family_of(config).windows(config)


def expected_tensors(
    config: Config,
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """The tensors of the model that `config`, already validated, describes.

    Returns two tables. The first maps each Linear's name, without ".weight", to its (N, K), in
    the order in which a forward pass uses them, layer by layer, and lm_head last unless it is
    tied. The second maps each resident tensor's checkpoint name to its shape: embedding, norms
    and biases.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    family = family_of(config)
    linear: dict[str, tuple[int, int]] = {}
    residents: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        for part in family.layer(config):
            name = f"model.layers.{index}.{part.name}"
            if not isinstance(part, Linear):
                residents[name] = part.shape
                continue
            linear[name] = (part.rows, part.columns)
            if part.bias:
                residents[f"{name}.bias"] = (part.rows,)
    residents["model.norm.weight"] = (hidden,)
    if not is_tied(config):
        linear["lm_head"] = (vocab, hidden)
    return linear, residents
