"""Model families. A file is named by its `model_type` in config.json and defines

- `parse_config(values, source)`: config.json -> a validated, frozen configuration (InputError naming the key);
- `layout(config)`: the units in order of computation, each with the name, shape and role of every tensor;
- `layer_kind(config, index)`: `attention` or `mamba`; `num_experts(config, index)`: 1 is a dense feed-forward;
- `active_share(config, spec)`: the share of a tensor that works on one token; `layer_prefix(index)` of tensor names;
- `initial_state(config, index, batch, device)` and `forward(config, index, weights, hidden, state, mask)`: one layer;
- `EMBEDDING`, `FINAL_NORM`, `LM_HEAD`: tensor names; `normalized(config)`: the optimum view that exporters read.
"""
