"""Classifies or scores a text, or a pair of texts, with an exported student, without torch and transformers.

python classify_on_device.py EXPORT_DIR "a warm and funny film" ["a second text"]

Prints the classes with their probabilities, the most likely first, or the number that a regression predicts.
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

directory, text, *second = sys.argv[1:]
with open(f"{directory}/export.json") as file:
    export = json.load(file)
tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
tokenizer.encode_special_tokens = True  # "[SEP]" in a text is ordinary text
tokenizer.enable_truncation(export["max_length"])
session = onnxruntime.InferenceSession(f"{directory}/model.int8.onnx", providers=["CPUExecutionProvider"])
row = tokenizer.encode(text, second[0] if second else None)
arrays = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
(logits,) = session.run(["logits"], {name: np.array([arrays[name]], np.int64) for name in export["inputs"]})
if export["labels"]:
    probabilities = np.exp(logits[0] - np.logaddexp.reduce(logits[0]))
    for class_id in np.argsort(-probabilities, kind="stable"):
        print(f"{probabilities[class_id]:.4f}\t{export['labels'][class_id]}")
else:
    print(float(logits[0, 0]))
