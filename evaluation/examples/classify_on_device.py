"""Classify a text (or score a pair) with an exported student: no torch, no transformers.

python classify_on_device.py EXPORT_DIR "a warm and funny film"

Prints the classes with their probabilities, the likeliest first; of a regression the number.
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

directory, text, *second = sys.argv[1:]
with open(f"{directory}/export.json") as file:
    about = json.load(file)
tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
tokenizer.encode_special_tokens = True  # a text that spells [SEP] does not end there
tokenizer.enable_truncation(about["max_length"])
session = onnxruntime.InferenceSession(f"{directory}/model.int8.onnx", providers=["CPUExecutionProvider"])
row = tokenizer.encode(text, second[0] if second else None)
arrays = {"input_ids": row.ids, "attention_mask": row.attention_mask, "token_type_ids": row.type_ids}
(logits,) = session.run(["logits"], {name: np.array([arrays[name]], np.int64) for name in about["inputs"]})
if about["labels"]:
    shares = np.exp(logits[0] - np.logaddexp.reduce(logits[0]))
    for place in np.argsort(-shares, kind="stable"):
        print(f"{shares[place]:.4f}\t{about['labels'][place]}")
else:
    print(float(logits[0, 0]))
