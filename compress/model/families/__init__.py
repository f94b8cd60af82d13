"""Model families. A file is named by its `model_type` in config.json and defines

- `parse_config(values, source)`: config.json -> a validated, frozen configuration (InputError naming the key);
- `layout(config)`: the units in order of computation, each with the name, shape and role of every tensor;
- `layer_kind(config, index)`: `attention` or `mamba`; `num_experts(config, index)`: 1 is a dense feed-forward;
- `router_rows(config, index)`: of a layer with experts, with those of removed ones that stay in the denominator;
- `active_share(config, spec)`: the share of a tensor that works on one token; `layer_prefix(index)` of tensor names;
- `initial_state(config, index, batch, device)` and `forward(config, index, weights, hidden, state, mask)`: one layer;
- `mix` and `feed_forward`, its halves; `feed_forward_input(config, weights, hidden)`: what the router and experts see;
- `router_logits(weights, x)`: [..., H] -> [..., R], the experts' rows first, in the order of their numbers;
- `expert(weights, number, rows)`: one expert on rows [n, H]; `expert_hidden(weights, number, rows)`: what its last
  matrix multiplies, [n, F]; `expert_prefix(number)`: what its tensor names begin with, within the layer;
- `input_groups(config, index)` and `folds(config, index)`: matrices by the input they share, and what produces it;
- `transformers_place(config, name)`: where a tensor belongs in transformers' model; `fit_transformers(config, model)`:
  replaces, in that model on the meta device, what its own configuration gives another shape than ours has;
- `EMBEDDING`, `FINAL_NORM`, `LM_HEAD`: tensor names; `normalized(config)`: the optimum view that exporters read.

Of these, `router_rows` and the functions of routers and experts are only called where a layer has more than one expert.
A file that begins with an underscore is a helper.
"""
