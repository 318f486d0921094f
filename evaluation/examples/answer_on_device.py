"""Answer a question from a text with an exported student: no torch, no transformers.

python answer_on_device.py EXPORT_DIR "who came?" "the red car came"
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

directory, question, context = sys.argv[1:]
with open(f"{directory}/export.json") as file:
    about = json.load(file)
tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
tokenizer.encode_special_tokens = True  # a text that spells [SEP] does not end there
tokenizer.enable_truncation(about["max_length"], strategy="only_second")
session = onnxruntime.InferenceSession(f"{directory}/model.int8.ort", providers=["CPUExecutionProvider"])
row = tokenizer.encode(question, context)
arrays = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
start, end = session.run(None, {name: np.array([arrays[name]], np.int64) for name in about["inputs"]})
tokens = [number for number, part in enumerate(row.sequence_ids) if part == 1]
spans = [(first, last) for first in tokens for last in tokens if first <= last < first + 30]
first, last = max(spans, key=lambda span: start[0, span[0]] + end[0, span[1]])
print(context[row.offsets[first][0] : row.offsets[last][1]])
