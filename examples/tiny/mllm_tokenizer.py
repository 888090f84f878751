"""The tiny MLLM's tokenizer: a SentencePiece unigram model, and the same model as `AutoTokenizer` reads it.

SentencePiece learns the pieces (`tokenizer.model`); `to_fast` rebuilds exactly that segmentation with the
tokenizers library (`tokenizer.json`), so both give the same ids for any text that does not spell out a
special token. Text is case-folded and NFKC-normalised first; what no piece covers falls back to bytes, so
every text encodes.
"""

import io
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<IMG_CONTEXT>"
SPECIAL_IDS = {PAD: 0, BOS: 1, EOS: 2, UNK: 3, IMAGE: 4}
SPACE = "▁"


def train_sentencepiece(texts: list[str], vocabulary: int) -> bytes:
    """Trains a unigram model of `vocabulary` pieces, 256 bytes and 5 special tokens among them.

    Returns the model file. One thread and no sampling, so the same texts give the same bytes.
    SentencePiece raises RuntimeError when the texts are too few for the vocabulary.
    """
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        model_type="unigram",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        num_threads=1,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece=PAD,
        bos_piece=BOS,
        eos_piece=EOS,
        unk_piece=UNK,
        control_symbols=[IMAGE],
        minloglevel=2,
    )
    return file.getvalue()


def to_fast(sentencepiece_file: bytes) -> PreTrainedTokenizerFast:
    """Builds the transformers tokenizer that gives the same ids as a SentencePiece unigram model."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sentencepiece_file)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL_IDS[UNK], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(left=True, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_IDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(sentencepiece_file: bytes, folder: Path) -> PreTrainedTokenizerFast:
    """Writes the tokenizer files into `folder`, `tokenizer.model` among them; returns the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = to_fast(sentencepiece_file)
    tokenizer.save_pretrained(str(folder))
    (folder / "tokenizer.model").write_bytes(sentencepiece_file)
    return tokenizer
