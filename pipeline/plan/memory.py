"""How many bytes a stage needs at its peaks, from shapes alone. Plain Python: no torch.

Every term is a tensor that the code of transformers, PEFT, TRL and pipeline/ppo keeps alive at a peak;
scripts/plan_oracle.py counts the same on that code and prints both; only CONTEXT is not counted there. `s` are the
model's shapes, `b` is bytes of the compute dtype; tokens of a pass include padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.plan.shapes import QUANTISED_BITS, Adapter, Shapes
from pipeline.plan.sizes import EVALUATION_LOGITS, EVALUATION_TOKENS, PPO_LOGITS, SHARD_BYTES
from pipeline.plan.work import Work

CONTEXT = round(0.6 * 2**30)
"""CUDA context, cuBLAS workspaces, fragmentation: 0.45 to 0.9 GiB in public reports; not measured by us."""
FUSED_HEAD_TOKENS, FUSED_HEAD_COLUMNS = 4096, 32768
"""The tile in which TRL's fused LM head makes logits (trl/kernels/chunked_logprob.py)."""
ANSWER_ROW = 64
"""Tokens that a question and its answer are taken to have."""
NORM_BACKWARD = 22
"""Bytes for each hidden unit that the backward pass of a norm holds: five tensors in float32 and one in bfloat16."""


@dataclass(frozen=True)
class Memory:
    """Bytes. The peaks are above what always stays: weights, adapters, gradients, optimizer."""

    quantised: int
    unquantised: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    """The most that is alive of a forward and backward pass, its logits not counted."""
    logits: int
    """What the LM head and the loss keep alive, on top of what the pass holds by then."""
    cache: int
    """Keys and values of answers being sampled."""
    training: int
    """Peak of a training step."""
    rollout: int
    evaluation: int
    engine: int
    """What a program that samples keeps while the stage trains."""
    merging: int
    """Of writing merged weights, in a process of its own: the base, one layer's sum in float32, and in RAM one shard
    (publish/merged.py). Reading them back to compare takes all of them once more, in the compute dtype."""

    @property
    def stays(self) -> int:
        return self.quantised + self.unquantised + self.adapters + self.gradients + self.optimizer + self.engine

    @property
    def total(self) -> int:
        """The stage's peak, as the GPU's own tools would show it."""
        return self.stays + max(self.training, self.rollout, self.evaluation) + CONTEXT


@dataclass(frozen=True)
class Model:
    """A base as a recipe holds it: shapes, whether its layers are in 4 bits, bytes of the compute dtype."""

    shapes: Shapes
    adapter: Adapter
    quantised: bool = True
    bytes: int = 2

    def weights(self, reward: bool) -> tuple[int, int]:
        """Bytes in 4 bits and in the compute dtype. A reward model has no LM head."""
        s = self.shapes
        others = s.other_parameters - (s.embedding_parameters if reward and not s.tied else 0)
        if not self.quantised:
            return 0, (s.linear_parameters + others) * self.bytes
        return round(s.linear_parameters * QUANTISED_BITS / 8), others * self.bytes

    @property
    def cached(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.shapes.layers * self.shapes.kv * self.bytes

    def saved(self, work: Work) -> int:
        """Bytes for each token that a decoder layer without checkpointing keeps for its backward pass."""
        s, b, lora = self.shapes, self.bytes, self.adapter.on(self.shapes)
        read = {linear.reads for linear in lora}
        # the norms take their input to float32 and keep it, with one scale for each row
        kept = s.norms * (4 * s.hidden + 4)
        if s.qk_norm:
            kept += 4 * (s.q + s.kv) + 4 * (s.heads + s.kv_heads)
        # attention keeps q, k, v, its result and a normaliser a head; under a mask grouped k and v are repeated
        repeated = (work.masked and s.kv_heads > 1 or work.eager) and s.kv_heads < s.heads
        values = s.q if repeated else (s.q + 2 * s.kv if s.fused else s.kv)
        kept += b * (s.q + (s.q if repeated else s.kv) + values + s.q) + 4 * s.heads
        if work.eager:  # the softmax in float32 and what is made of it
            kept += (4 * (b < 4) + b) * s.heads * work.span
        elif work.masked:
            kept += b * work.span
        # the MLP keeps gate, up and what the activation makes of the gate
        kept += b * 3 * s.intermediate
        if self.adapter.dropout:  # every adapter keeps its own dropped-out input, and the mask
            kept += sum((b + 1) * linear.inputs for linear in lora)
        else:
            kept += b * (s.hidden * (("attention" in read) + ("mlp" in read)) + s.intermediate * ("product" in read))
        return kept + len(lora) * self.adapter.r * b

    def dequantised(self) -> int:
        """The largest matrix, as it is unpacked for the moment of its use."""
        return self.bytes * self.shapes.largest_linear if self.quantised else 0

    def transient(self, tokens: int, scores: int = 0) -> int:
        """Peak of a forward pass that keeps nothing: the MLP of one layer, or its attention where that is eager and
        makes so many scores for each head."""
        s, b = self.shapes, self.bytes
        up = 2 * s.intermediate if s.fused else s.intermediate
        waiting = 4 * b * s.hidden + (0 if s.fused else b * s.intermediate)
        mlp = tokens * waiting + max(tokens * 3 * b * up, tokens * b * up + self.dequantised())
        attention = tokens * 6 * b * s.hidden + (b + (b + 4 + 4 * (b < 4)) * s.heads) * scores  # the mask among them
        return self.rounded() + max(mlp, attention)

    def tile(self, tokens: int) -> int:
        """Logits that TRL's fused head makes at once."""
        return min(tokens, FUSED_HEAD_TOKENS) * min(self.shapes.vocab, FUSED_HEAD_COLUMNS) * self.bytes

    def held(self, work: Work) -> int:
        """What the layers keep of a whole forward pass until its backward pass begins."""
        s, b = self.shapes, self.bytes
        free = s.layers - work.checkpointed
        kept = work.tokens * (b * s.hidden * work.checkpointed + self.saved(work) * free)
        if not work.checkpointed:
            kept -= work.tokens * 4 * s.hidden  # embeddings take no gradient: the first norm keeps nothing
        if work.masked:  # one mask for all layers, of booleans or for eager attention of numbers
            kept += work.tokens * work.span * (b if work.eager else 1)
        return kept + round(self.rounded() * free / s.layers)

    def rounded(self) -> int:
        """Autocast's rounded copies of an adapter that has dropout and so is not computed in one with its layer."""
        return self.bytes * self.adapter.parameters(self.shapes) if self.bytes < 4 and self.adapter.dropout else 0

    def backward(self, work: Work) -> int:
        """Peak of the backward pass. While it goes back, what it holds falls and the gradients it makes grow; those of
        earlier passes lie aside. The peak is at its start, where checkpointing begins, or in the first layer."""
        s = self.shapes
        made = 4 * self.adapter.parameters(s) / s.layers if work.accumulates else 0.0
        peaks = []
        for left in {s.layers, min(work.checkpointed, s.layers), 1} - {0}:
            below = replace(self, shapes=replace(s, layers=left))
            held = below._backward(replace(work, checkpointed=min(work.checkpointed, left)))
            peaks.append(held + round(made * (s.layers - left)))
        return max(peaks)

    def _backward(self, work: Work) -> int:
        """Peak in the last layer: in the norm behind it, or as it enters its MLP or its attention."""
        s, b = self.shapes, self.bytes
        held = self.held(work)
        last_norm = held + work.tokens * (4 + NORM_BACKWARD) * s.hidden
        if work.checkpointed == s.layers:  # the last layer is computed again first
            held += work.tokens * self.saved(work) + round(self.rounded() / s.layers)
        down = b * s.intermediate * s.hidden if self.quantised else 0
        entering = held + work.tokens * b * (s.intermediate + s.hidden * (1 + s.scaled)) + down
        # as the way back passes the product of gate and up, with nothing unpacked
        product = held + work.tokens * b * ((3 if s.fused else 2) * s.intermediate + s.hidden)
        # where gate and up are one matrix it is the larger one, and its gradient comes when less is held
        later = held + self.dequantised() + work.tokens * b * (s.hidden - s.intermediate)
        own_norm = held + work.tokens * NORM_BACKWARD * s.hidden if s.norms > 2 else 0
        scores = 0
        if work.eager:  # by then the MLP's part is gone; the way back through the softmax is in float32
            gone = 4 * s.hidden + b * (3 * s.intermediate + (s.hidden + s.intermediate) * (not self.adapter.dropout))
            scores = held + work.tokens * ((b + 4) * s.heads * work.span - gone)
        return max(last_norm, entering, product, later, own_norm, scores)


def memory(model: Model, work: Work) -> Memory:
    """What a stage needs on a GPU."""
    if work.episodes:  # ppo switches dropout off
        model = replace(model, adapter=replace(model.adapter, dropout=0.0))
    s, b = model.shapes, model.bytes
    quantised, unquantised = model.weights(reward=work.score_head)
    parameters = model.adapter.parameters(s) + (s.hidden if work.score_head else 0)
    trained = work.trained * parameters
    held, activations = model.held(work), model.backward(work)
    final = work.tokens * (4 + b) * s.hidden  # the last norm's input in float32, and the states the head is given
    rollout = cache = 0
    if work.episodes:
        # of a part the logits, and in float32: less their greatest, the softmax, their product; + 2 as counted
        logits = final + (b + 14) * min(work.rows * work.answer, PPO_LOGITS // s.vocab) * s.vocab
        cache = 0 if work.engine else work.episodes * work.length * model.cached
        rollout = _rollout(model, work, cache)
    elif work.score_head:
        logits = work.tokens * 4 * s.hidden
    else:
        logits = final + work.tokens * (4 + b) * s.hidden + model.tile(work.tokens)
        if work.reference:  # its forward pass, while the policy's waits for its backward pass
            longest = max(work.length, work.mismatched)
            tokens = work.rows * longest
            passing = max(
                model.transient(tokens, tokens * longest * work.eager), tokens * 2 * b * s.hidden + model.tile(tokens)
            )
            activations = max(activations, held + final + passing)
    if work.sampled:
        before = memory(model, work.sampled)
        rollout, cache = before.rollout, before.cache
    training = max(activations, held + logits)
    if work.again:  # their own passes, whose every token may go through the head
        rows, longest, sampled = work.rows_again or work.rows, max(work.again), max(1, work.episodes)
        text = replace(work, rows=rows, length=longest, answer=longest, episodes=sampled, reference=False, again=())
        along = memory(model, text)
        activations, logits = max(activations, along.activations), max(logits, along.logits)
        training = max(training, along.training)
    return Memory(
        quantised=quantised,
        unquantised=unquantised,
        adapters=trained * 4 + work.frozen * parameters * b,
        gradients=trained * 4,
        optimizer=round(trained * work.optimizer_bytes),
        activations=activations,
        logits=logits,
        cache=cache,
        training=training,
        rollout=rollout,
        evaluation=evaluation(model, work) if work.evaluates else 0,
        engine=(work.sampled or work).engine_asleep,
        merging=quantised + unquantised + min(SHARD_BYTES, s.parameters * b) + (b + 12) * s.largest_linear,
    )


def _rollout(model: Model, work: Work, cache: int) -> int:
    """Peak of sampling the answers, and of what policy, reference, reward models and critic say of them afterwards."""
    s, b = model.shapes, model.bytes
    prompt = work.length - work.answer
    scores = work.episodes * prompt * prompt if work.eager else 0
    prefill = model.transient(work.episodes * prompt, scores) + cache * prompt // work.length
    sampling = max(prefill, _decoding(model, work, cache, work.episodes))
    if work.engine:
        sampling = work.engine - work.engine_asleep
    if work.dequantized_rollout:  # the copies are made in float32, one after the other
        sampling = b * s.linear_parameters + max(sampling, 12 * s.largest_linear)
    at_once = min(work.rows * work.answer, max(1, PPO_LOGITS // s.vocab))
    head = work.tokens * b * s.hidden + at_once * s.vocab * (b + 8)
    return max(sampling, head, model.transient(2 * work.tokens, 2 * work.scores))


def _decoding(model: Model, work: Work, cache: int, rows: int) -> int:
    """A step of sampling: one layer's keys and values are copied to make room for the next token, and again, once for
    each head that shares them; the distribution is made in float32."""
    s, b = model.shapes, model.bytes
    shared = s.heads // s.kv_heads if work.masked or work.eager or work.segments else 1
    return cache + max(cache // s.layers * shared, rows * s.vocab * (b + 4))


def evaluation(model: Model, work: Work) -> int:
    """Held-out scoring and questions: batches of so many tokens, or of one row."""
    tokens = max(EVALUATION_TOKENS, work.held_out)
    scores = tokens * work.held_out if work.eager else 0
    if work.score_head:
        return model.transient(tokens, scores)
    peak = 0 if work.episodes else scored(model, tokens, scores)
    if work.answering:
        cache = work.answering * model.cached
        prefill = model.transient(work.answering, work.answering * ANSWER_ROW if work.eager else 0) + cache
        peak = max(peak, prefill, _decoding(model, work, cache, max(1, work.answering // ANSWER_ROW)))
    return peak


def scored(model: Model, tokens: int, scores: int = 0) -> int:
    """A pass without gradients over so many tokens, and their log-likelihoods, a part of the logits at a time."""
    s, b = model.shapes, model.bytes
    head = tokens * b * s.hidden + min(EVALUATION_LOGITS // s.vocab, tokens) * s.vocab * (b + 4 + 4 * (b < 4))
    return max(model.transient(tokens, scores), head)
