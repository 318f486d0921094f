"""What is done with a model of any family: it is loaded, cut below its top layers, replayed, and shrunk.

A teacher is cut below its top n layers (``store.replay_layers: n``). The teacher pass runs the lower part and
stores its output; training runs the frozen top on it.

Axes: B batch, L length, D hidden size, V vocabulary, n replayed layers. ``token_count`` is int [B], the
number of real tokens of each row, which come first. If it is None, or a CPU tensor that is L everywhere, no
row is padded and no attention mask is built. Building a mask never synchronises with the device. ``config``
is a teacher's configuration, as a transformers object or as the mapping in its ``config.json``.

=============  ===========================================================================================
``loading``    ``load_model(directory, config) -> PreTrainedModel``: float32, from safetensors, on the CPU;
               ``has_masked_lm_head(model)``, ``require_head(model)``  (torch, transformers)
``weights``    ``named_weights(model)``, ``top_weights(model, n)``, ``rest_weights(model, n)``  (torch)
``split``      ``lower(model, n) -> Lower``; ``Lower(input_ids [B, L], token_count) -> [B, L, D]``,
               zero at padded positions  (torch, transformers)
``masks``      ``encoder_mask(config, token_count, length, device, dtype)``: the ``attention_mask`` of an
               encoder, teacher or student, ``visible_positions``  (torch)
``replay``     ``Replay(config, weights, n)``: ``queries_keys_values``, ``last_hidden``,
               ``last_hidden_and_queries_keys_values``, ``decoder_input``, ``decoder_weight``,
               ``decoder_bias``  (torch, transformers)
``head``       ``MaskedLmHead``: the head's arithmetic for teachers, replay and students  (torch)
``students``   ``Shape``, ``choose_layers``, ``student_config``, ``student_weights``, ``new_student``
               (torch, transformers)
``slicing``    ``sliced_weights``: first weights of a narrower student  (torch)
``recording``  ``QueriesKeysValues(model, layer)``: records Q, K, V in a forward; ``projected``  (torch)
``pooling``    ``Pooling``, ``read_pooling(directory)``; ``pool(hidden, token_count, pooling)`` (torch)
=============  ===========================================================================================

A typical use::

    model = load_model(directory)                      # the teacher pass
    top, rest = top_weights(model, n), rest_weights(model, n)   # two safetensors files; together all weights
    stored = lower(model, n).to(torch.bfloat16)(input_ids, token_count)

    replay = Replay(config, top, n).to(device)         # training
    q, k, v = replay.queries_keys_values(stored, token_count)
    last = replay.last_hidden(stored, token_count)
    z = replay.decoder_input(last[positions])          # then the chunked loss over decoder_weight

    layers = choose_layers("every_second", config)     # a student
    shape = student_config(config, layers, Shape(hidden_size=192), dropout=0.1)
    student = new_student(shape, None, head=True, seed=0)
    recorder = QueriesKeysValues(student, layer=-1)
    hidden = student.base_model(input_ids, attention_mask).last_hidden_state
    q, k, v = recorder.take()

Everything a user can put right is raised as `infra.errors.UserError`.
"""
