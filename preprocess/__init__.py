"""Stage 1a: annotation files -> captions.jsonl and vocab.json."""

from captioning.runtime.registry import Registry

# name -> class, see preprocess/readers/protocol.py; a file is read by the first reader that recognises it
ANNOTATION_READERS = Registry(
    "annotation file",
    {
        "karpathy": "preprocess.readers.karpathy:KarpathyReader",
        "coco": "preprocess.readers.coco:CocoReader",
        "rows": "preprocess.readers.rows:RowsReader",
        "ai-challenger": "preprocess.readers.ai_challenger:AiChallengerReader",
        "mapping": "preprocess.readers.mapping:MappingReader",
        "numbered": "preprocess.readers.numbered:NumberedReader",
        "flickr30k": "preprocess.readers.flickr30k:Flickr30kReader",
        "delimited": "preprocess.readers.delimited:DelimitedReader",
        "photo-folder": "preprocess.readers.photo_folder:PhotoFolderReader",
    },
)
# name -> function: caption -> the caption's words, separated by whitespace
TOKENIZERS = Registry(
    "--tokenizer",
    {
        "jieba": "preprocess.tokenizers:separate_with_jieba",
        "whitespace": "preprocess.tokenizers:separate_at_whitespace",
        "character": "preprocess.tokenizers:separate_characters",
        "fugashi": "preprocess.tokenizers:separate_with_fugashi",
        "pythainlp": "preprocess.tokenizers:separate_with_pythainlp",
    },
)
