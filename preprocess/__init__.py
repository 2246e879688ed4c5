"""Stage 1a: annotation files -> captions.jsonl and vocab.json."""

from captioning.runtime.registry import Registry

# name -> class, see preprocess/readers/protocol.py; a file is read by the first reader that recognises it
ANNOTATION_READERS = Registry(
    "annotation file",
    {
        "ai-challenger": "preprocess.readers.ai_challenger:AiChallengerReader",
        "coco": "preprocess.readers.coco:CocoReader",
        "karpathy": "preprocess.readers.karpathy:KarpathyReader",
    },
)
# name -> function: caption -> the caption's words, separated by whitespace
TOKENIZERS = Registry(
    "--tokenizer",
    {
        "jieba": "preprocess.tokenizers:separate_with_jieba",
        "whitespace": "preprocess.tokenizers:separate_at_whitespace",
        "character": "preprocess.tokenizers:separate_characters",
    },
)
