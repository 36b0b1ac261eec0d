"""Texts survive being made tokens and back, whatever is in them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from markovia.envs.text.tokens import CharTokenizer, HFTokenizer, as_tokenizer

ANY = st.characters(exclude_categories=["Cs"])  # surrogates are no characters of their own


@st.composite
def alphabets(draw):
    """(alphabet, eos)."""
    letters = draw(st.lists(ANY, min_size=2, max_size=20, unique=True))
    return "".join(letters[1:]), letters[0]


@given(alphabets(), st.data())
def test_characters_round_trip(given_alphabet, data):
    alphabet, eos = given_alphabet
    tokenizer = CharTokenizer(alphabet, eos)
    text = data.draw(st.text(st.sampled_from(alphabet)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)
    assert all(3 <= i < tokenizer.vocab_size for i in ids)  # never one of the special ids
    # What generation adds around a text does not show: padding, bos, eos.
    assert tokenizer.decode([tokenizer.pad_token_id, tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) == text
    assert tokenizer.encode(text + eos) == [*ids, tokenizer.eos_token_id]


@given(alphabets(), st.text(ANY, min_size=1))
def test_a_text_outside_of_the_alphabet_is_refused_with_what_is_missing(given_alphabet, text):
    alphabet, eos = given_alphabet
    unknown = set(text) - set(alphabet) - {eos}
    if not unknown:
        assert len(CharTokenizer(alphabet, eos).encode(text)) == len(text)
        return
    with pytest.raises(ValueError, match="lacks") as error:
        CharTokenizer(alphabet, eos).encode(text)
    assert repr(sorted(unknown)[0]) in str(error.value)


@given(alphabets(), st.lists(st.integers(-5, 40)))
def test_any_ids_can_be_shown(given_alphabet, ids):
    alphabet, eos = given_alphabet
    tokenizer = CharTokenizer(alphabet, eos)
    assert tokenizer.decode(ids) == "".join(alphabet[i - 3] for i in ids if 3 <= i < tokenizer.vocab_size)


@pytest.fixture(scope="module", params=["plain", "closes every text"])
def hugging_face(request):
    """A byte-level tokenizer trained on a few words, which can write any text; one that adds EOS by itself, and one that does not."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["a film that moves , a film that does not ."] * 5, trainer)
    if request.param != "plain":
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return as_tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))


@given(st.text(ANY, max_size=30))
def test_hugging_face_texts_round_trip(hugging_face, text):
    assert isinstance(hugging_face, HFTokenizer) and hugging_face.pad_token_id == hugging_face.eos_token_id == 0
    ids = hugging_face.encode(text)
    assert hugging_face.decode(ids) == text
    assert hugging_face.eos_token_id not in ids and all(0 <= i < hugging_face.vocab_size for i in ids)
    assert hugging_face.decode([*ids, hugging_face.eos_token_id, hugging_face.pad_token_id]) == text
