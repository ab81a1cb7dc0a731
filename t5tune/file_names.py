"""Names of files and folders that several modules read or write, or that other programs define."""

# a model's folder, as transformers writes it
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TRIM_FILE = "trim.json"  # of a trimmed base: its own base, and the rows that were kept
MODEL_FILE = "model.safetensors"
MODEL_BIN_FILE = "pytorch_model.bin"
MODEL_SUFFIXES = {".safetensors", ".bin"}
INDEX_SUFFIX = ".index.json"  # of the map from tensors to shards: model.safetensors.index.json
MODEL_CARD_FILE = "README.md"

# a tokenizer
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model")
BPE_FILES = ("vocab.json", "merges.txt")  # of byte-level BPE, such as CodeT5's
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

# a model that was converted to CTranslate2
CTRANSLATE2_WEIGHTS_FILE = "model.bin"
CTRANSLATE2_VOCABULARY_FILE = "shared_vocabulary.json"

# a model that was converted to ONNX
ONNX_FOLDER = "onnx"
ONNX_SUFFIXES = {".onnx", ".onnx_data"}
ONNX_PAGE_FILE = "index.html"

# an adapter's folder, as PEFT writes it, and what t5tune adds
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_BIN_FILE = "adapter_model.bin"
NON_LORA_FILE = "non_lora_state.safetensors"
TEMPLATE_FILE = "template.yaml"
TRAINING_DATA_FILE = "training_data.json"

# a token cache, and a part of one
TOKENS_FILE = "tokens.bin"
CONVERSATIONS_FILE = "conversations.bin"
EXAMPLES_FILE = "examples.bin"
REJECTED_FILE = "rejected.jsonl"
REJECTED_SUFFIX = f".{REJECTED_FILE}"  # of the file next to a cache that isn't written
CACHE_MANIFEST_FILE = "manifest.json"
PART_MANIFEST_FILE = "part.json"

# the folder with the token caches of all datasets
MIXTURE_FILE = "mixture.json"

# data; all but Parquet and Excel may also be compressed
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
TABLE_SUFFIXES = {".csv", ".tsv", ".parquet", ".xlsx"}
TEXT_SUFFIXES = {".txt"}
COMPRESSED_SUFFIXES = (".gz", ".zst")

# a run's folder, and its checkpoints
RUN_CACHE_FOLDER = "data"
EVAL_CACHE_FOLDER = "eval-data"
SETTINGS_FILE = "settings.yaml"
RESULT_FILE = "result.json"
RUN_FILE = "run.json"
REPORT_FILE = "report.html"
SCORES_FILE = "scores.json"
CHECKPOINT_MANIFEST_FILE = "t5tune_manifest.json"
TRAINER_STATE_FILE = "trainer_state.json"
