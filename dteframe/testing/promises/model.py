"""What every model promises."""

from __future__ import annotations

from dteframe.contracts import Model, Policy
from dteframe.testing.promises.every_kind import state_comes_back
from dteframe.testing.subject import Subject, insist


def tokenizer_can_pad_and_end(subject: Subject) -> None:
    """The tokenizer has an end-of-sequence token and a pad token."""
    tokenizer = _loaded(subject).tokenizer
    insist(tokenizer.eos_token_id is not None, "the tokenizer has no end-of-sequence token")
    insist(tokenizer.pad_token_id is not None, "the tokenizer has no pad token")


def every_token_has_an_embedding(subject: Subject) -> None:
    """The module can read every token that the tokenizer can write."""
    policy = _loaded(subject)
    largest = max(policy.tokenizer.get_vocab().values())
    rows = len(policy.module.get_input_embeddings().get_parameter("weight"))
    insist(largest < rows, f"token {largest} exists, but there are {rows} embeddings")


def module_is_ready_to_sample(subject: Subject) -> None:
    """The module is in evaluation mode, on the device of the context, and ``Policy.device`` says so."""
    policy = _loaded(subject)
    insist(not policy.module.training, "the module is in training mode; call module.eval()")
    insist(policy.device == "cpu", f"policy.device is {policy.device!r}, the context's is 'cpu'")
    elsewhere = {str(item.device) for item in policy.module.parameters()} - {"cpu"}
    insist(not elsewhere, f"parameters on {sorted(elsewhere)}, the context's device is 'cpu'")


def parameters_have_the_type_of_the_recipe(subject: Subject) -> None:
    """Every floating-point parameter has ``config.dtype``, and some can be trained."""
    policy = _loaded(subject)
    parameters = list(policy.module.parameters())
    wanted = subject.config().dtype
    found = {str(item.dtype).removeprefix("torch.") for item in parameters if item.is_floating_point()}
    insist(found == {wanted}, f"parameters of {sorted(found)}, config.dtype is {wanted!r}")
    insist(any(item.requires_grad for item in parameters), "no parameter can be trained")


def equal_seeds_give_equal_weights(subject: Subject) -> None:
    """Loading again, from the cache or not, gives the same weights bit for bit."""
    first, second = _loaded(subject).module.state_dict(), _loaded(subject).module.state_dict()
    insist(first.keys() == second.keys(), "the second load has other parameters")
    differing = [name for name, value in first.items() if not value.equal(second[name])]
    insist(not differing, f"{len(differing)} parameters differ from load to load, such as {differing[:1]}")


def questions_can_be_read(subject: Subject) -> None:
    """A forward pass over a question gives finite logits, one row per token."""
    import torch

    policy = _loaded(subject)
    token_ids = policy.tokenizer.encode(subject.questions[0].text)
    with torch.no_grad():
        logits = policy.module(input_ids=torch.tensor([token_ids])).logits
    insist(logits.shape[:2] == (1, len(token_ids)), f"logits of shape {tuple(logits.shape)}")
    insist(bool(torch.isfinite(logits).all()), "the logits are not finite")


def _loaded(subject: Subject) -> Policy:
    model: Model = subject.make()
    return model.load(subject.questions)


PROMISES = (
    state_comes_back,
    tokenizer_can_pad_and_end,
    every_token_has_an_embedding,
    module_is_ready_to_sample,
    parameters_have_the_type_of_the_recipe,
    equal_seeds_give_equal_weights,
    questions_can_be_read,
)
