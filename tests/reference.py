"""An independent, slow definition of the model: loops over recursions, layers, tokens and heads.

Written from METHOD's equations, one sequence at a time, without any code of the package. Weights
come as a state dict. Everything is differentiable, so that gradients can be compared as well.
"""

import math

import torch


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean() + eps)


def rope(heads, position, theta):
    half = heads.shape[-1] // 2
    angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    c, s = torch.cos(angles), torch.sin(angles)
    left, right = heads[:, :half], heads[:, half:]
    return torch.cat([left * c - right * s, right * c + left * s], -1)


class Reference:
    def __init__(self, weights, config):
        self.w, self.c = weights, config

    def layer_of_pass(self):
        """(recursion, layers) in order, from METHOD's table of sharing schemes."""
        n, r = self.c.shared_layers, self.c.num_recursions
        if self.c.shared_order == "cycle":
            return [(i, list(range(n))) for i in range(r)]
        return [(i, [layer]) for layer in range(n) for i in range(r)]

    def linear(self, name, x, later):
        """A linear layer; at later recursions with its adapter, if it has one."""
        out = self.w[f"{name}.weight"] @ x
        if later and f"{name}.lora_A.weight" in self.w:
            change = self.w[f"{name}.lora_B.weight"] @ (self.w[f"{name}.lora_A.weight"] @ x)
            out = out + change * self.c.lora_alpha / self.c.lora_rank
        return out

    def block(self, name, states, keys_of, write, later=False):
        """One layer over ``states`` {position: vector}. keys_of(position, own) -> [(k, v)] that it
        may see."""
        c, w = self.c, self.w
        normed = {
            p: rms_norm(x, w[f"{name}.attention_norm.weight"], c.norm_eps)
            for p, x in states.items()
        }
        own = {p: self.entry(name, p, x, later) for p, x in states.items()}
        write(own)
        out = {}
        for p, x in normed.items():
            q = self.linear(f"{name}.attention.q_proj", x, later).view(c.num_heads, c.head_dim)
            q = rope(q, p, c.rope_theta)
            seen = keys_of(p, own)
            heads = []
            for n in range(c.num_heads):
                g = n // (c.num_heads // c.num_kv_heads)
                keys, values = (torch.stack([entry[i][g] for entry in seen]) for i in (0, 1))
                heads.append(torch.softmax(keys @ q[n] / math.sqrt(c.head_dim), 0) @ values)
            h = states[p] + self.linear(f"{name}.attention.o_proj", torch.cat(heads), later)
            y = rms_norm(h, w[f"{name}.feed_forward_norm.weight"], c.norm_eps)
            gate = self.linear(f"{name}.feed_forward.gate_proj", y, later)
            up = self.linear(f"{name}.feed_forward.up_proj", y, later)
            hidden = gate * torch.sigmoid(gate) * up
            out[p] = h + self.linear(f"{name}.feed_forward.down_proj", hidden, later)
        return out

    def entry(self, name, p, x, later):
        """Key and value of a state at position p."""
        c = self.c
        x = rms_norm(x, self.w[f"{name}.attention_norm.weight"], c.norm_eps)
        k = self.linear(f"{name}.attention.k_proj", x, later).view(c.num_kv_heads, c.head_dim)
        v = self.linear(f"{name}.attention.v_proj", x, later).view(c.num_kv_heads, c.head_dim)
        return rope(k, p, c.rope_theta), v

    def own_layers(self, kind, count, states):
        for i in range(count):
            states = self.block(
                f"{kind}.{i}",
                states,
                lambda p, own: [own[j] for j in sorted(own) if j <= p],
                lambda own: None,
            )
        return states

    def keys_for(self, recursion, layer, first, everyone):
        """METHOD section 6: which keys a token active at this recursion sees. everyone: the states
        of all tokens before it; those that left are as they were then."""
        strategy = self.c.kv_strategy

        def keys_of(p, own):
            if strategy == "recursion_wise" or recursion == 0:
                return [own[j] for j in sorted(own) if j <= p]
            if strategy == "final":
                name = f"recursions.shared_blocks.{layer}"
                return [
                    own[j] if j in own else self.entry(name, j, everyone[j], later=True)
                    for j in sorted(everyone)
                    if j <= p
                ]
            base = first[layer]
            if strategy == "shared":
                return [base[j] for j in sorted(base) if j <= p]
            return [own.get(j, base[j]) for j in sorted(base) if j <= p]

        return keys_of

    def stack(self, recursion, layers, states, first, everyone):
        before = states
        if self.c.deepened and recursion:
            # Those that left are seen as if they went on.
            states, everyone = (
                {p: h + self.look_back(h, self.entered[p]) for p, h in some.items()}
                for some in (states, everyone)
            )
        states = self.layers_of(recursion, layers, states, first, everyone)
        if self.c.deepened and recursion:
            gate = 10 * self.w["recursions.deepening.gate"]
            states = {p: before[p] + gate * (out - before[p]) for p, out in states.items()}
        return states

    def look_back(self, h, entered):
        ones = torch.ones_like(h)
        both = torch.cat([rms_norm(x, ones, self.c.norm_eps) for x in (h, entered)])
        return self.w["recursions.deepening.reinject.weight"] @ both

    def layers_of(self, recursion, layers, states, first, everyone):
        for layer in layers:

            def write(own, layer=layer):
                if recursion == 0:
                    first[layer] = own

            states = self.block(
                f"recursions.shared_blocks.{layer}",
                states,
                self.keys_for(recursion, layer, first, everyone),
                write,
                later=recursion > 0,
            )
        return states

    def score(self, logit):
        name = self.c.router.score_name
        return {
            "sigmoid": torch.sigmoid,
            "tanh": torch.tanh,
            "none": lambda x: x,
            "softmax": lambda x: torch.softmax(x, 0),
        }[name](logit)

    def net(self, name, x):
        if self.c.router.reads == "direction":
            x = x / x.square().sum().sqrt()
        if f"{name}.weight" in self.w:
            return self.w[f"{name}.weight"] @ x
        hidden = self.w[f"{name}.0.weight"] @ x
        return self.w[f"{name}.2.weight"] @ (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def gated(self, recursion, h, out, gate):
        if self.c.deepened and recursion == 0:
            return out
        if self.c.deepened:
            return h + gate * (out - h)
        return h + gate * out if self.c.router.gate == "paper" else h + gate * (out - h)

    def forward(self, ids, selection):
        """(logits_TV, {loss name: value}, depth of each token)."""
        c = self.c
        states = {p: self.w["embedding.weight"][i] for p, i in enumerate(ids)}
        states = self.entered = self.own_layers("prelude", c.prelude_layers, states)
        run = {
            "fixed": self.fixed,
            "expert_choice": self.expert_choice,
            "token_choice": self.token_choice,
        }
        states, losses, depth = run[c.router.kind](states, selection)
        states = self.own_layers("coda", c.coda_layers, states)
        head = self.w.get("head.weight", self.w["embedding.weight"])
        final = self.w["final_norm.weight"]
        logits = torch.stack(
            [head @ rms_norm(states[p], final, c.norm_eps) for p in sorted(states)]
        )
        return logits, losses, depth

    def fixed(self, states, selection):
        first = {}
        for recursion, layers in self.layer_of_pass():
            states = self.stack(recursion, layers, states, first, states)
        return states, {}, [self.c.num_recursions] * len(states)

    def expert_choice(self, states, selection):
        c, r = self.c, self.c.router
        length, first, selected = len(states), {}, sorted(states)
        depth, bce_sum, z_sum = [0] * length, 0.0, 0.0
        by_gain = r.causal_selection == "gain"
        for recursion, layers in self.layer_of_pass():
            candidates = selected if r.hierarchical else sorted(states)
            name = f"recursions.router.nets.{recursion}"
            logit = {p: self.net(name, states[p])[0] for p in candidates}
            causal = logit
            rank = logit
            if r.causal_selection != "aux_loss":
                aux = f"recursions.router.aux_nets.{recursion}"
                seen = {p: states[p] if by_gain else states[p].detach() for p in candidates}
                causal = {p: self.net(aux, seen[p])[0] for p in candidates}
                rank = causal if by_gain else logit
            capacity = c.capacities[recursion]
            if capacity == 1:
                selected = list(candidates)
            elif selection == "topk":
                k = max(1, int(capacity * length))
                selected = sorted(sorted(candidates, key=lambda p: -rank[p].item())[:k])
            else:
                limit = self.w["recursions.router.threshold_R"][recursion]
                selected = [p for p in candidates if torch.sigmoid(causal[p]) > limit]
            bce = 0.0
            for p in candidates:
                probability = torch.sigmoid(causal[p])
                bce = bce - torch.log(probability if p in selected else 1 - probability) / len(
                    candidates
                )
                z_sum = z_sum + logit[p] ** 2 / len(candidates)
            bce_sum = bce_sum + bce
            if not selected:
                continue
            active = {p: states[p] for p in selected}
            out = self.stack(recursion, layers, active, first, states)
            states = dict(states)
            for p in selected:
                gate = r.gate_scale * self.score(logit[p] + (2.0 if by_gain else 0.0))
                states[p] = self.gated(recursion, states[p], out[p], gate)
                depth[p] += 1
        # Without exits there is nothing to learn gains from.
        losses = {"gain": torch.zeros(())} if by_gain else {"selection": bce_sum}
        losses |= {"z_loss": z_sum} if r.z_loss_weight else {}
        return states, losses if selection == "topk" else {}, depth

    def token_choice(self, states, selection):
        c, r = self.c, self.c.router
        h_1, first = dict(states), {}
        logits = {p: self.net("recursions.router.net", x) for p, x in states.items()}
        scores = {p: self.score(x) for p, x in logits.items()}
        bias = self.w["recursions.router.bias_R"]
        depth = [int(torch.argmax(scores[p] + bias)) + 1 for p in sorted(states)]
        for recursion, layers in self.layer_of_pass():
            active = [p for p in sorted(states) if depth[p] > recursion]
            if not active:
                continue
            out = self.stack(recursion, layers, {p: states[p] for p in active}, first, states)
            states = dict(states)
            for p in active:
                gate, last = r.gate_scale * scores[p][recursion], depth[p] == recursion + 1
                if c.deepened:
                    states[p] = self.gated(recursion, states[p], out[p], gate)
                elif r.combination == "last":
                    states[p] = self.gated(recursion, h_1[p], out[p], gate) if last else out[p]
                else:
                    states[p] = gate * out[p] + (h_1[p] if last else 0)
        losses = {}
        if r.balancing == "loss":
            n = c.num_recursions
            share = [sum(d == i + 1 for d in depth) / len(depth) * n for i in range(n)]
            mean = [
                sum(scores[p][i] / scores[p].sum() for p in scores) / len(depth) for i in range(n)
            ]
            losses["balancing"] = sum(f * m for f, m in zip(share, mean, strict=True))
        if r.z_loss_weight:
            losses["z_loss"] = sum(torch.logsumexp(x, 0) ** 2 for x in logits.values()) / len(depth)
        return states, losses, depth
