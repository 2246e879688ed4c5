"""The decoders equal their papers' equations, written plainly: one word at a time, on the full 14x14 map."""

import math
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from captioning.decoders import DECODERS, protocol
from captioning.decoders.factory import build_decoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.decoders.protocol import spread_attention
from captioning.encoders.grid import Grid, grid_pooling, pooling_matrix

SIZES = {
    "vocabulary_size": 11,
    "channels": 6,
    "embedding_size": 5,
    "attention_size": 4,
    "hidden_size": 7,
    "dropout": 0.0,
}
OWN_SIZES = {  # of decoders that those above do not fit
    "transformer": {"hidden_size": 8, "heads": 2, "layers": 2, "encoder_layers": 2, "feed_forward_size": 9},
    "xlan": {"attention_size": 8, "heads": 2, "encoder_layers": 2},
    "aoa": {"hidden_size": 8, "heads": 2, "encoder_layers": 2},
}
OVER_NATIVE_CELLS = ("xlan", "aoa")  # these decoders do not attend to the 14x14 map
POSITIONS_IN_CELLS = ("attention", "hard-attention", "adaptive", "updown")  # others: in a projection of the cells
LENGTHS = [5, 4, 4, 2, 1]
PHOTO = torch.tensor([1, 0, 2, 1, 0])  # photo_index: the photo of each caption
VARIANTS = [
    *DECODERS,
    "lstm --cell gru",
    "lstm --cell rnn --layers 2",
    "lstm --layers 3 --photo_norm none",
    "transformer --embedding_size 8 --encoder_layers 0 --positions none",
    "transformer --memory_slots 3 --positions sinusoidal --layers 1",
]


def make(variant, seed=0):
    """A decoder in float64, the grid of 3 photos, their cells (3, P, 6), words (5, 6), the words packed.

    The cells are those of the equations: the 14x14 map (P = 196), or the native cells (P = 64).
    """
    torch.manual_seed(seed)
    name, *flags = variant.split(" --")
    settings = {key: int(value) if value.isdigit() else value for key, value in map(str.split, flags)}
    decoder = build_decoder(name, {**SIZES, **OWN_SIZES.get(name, {}), **settings}).double()
    features = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    grid = Grid(features.flatten(2).transpose(1, 2), grid_pooling(8, 8).double())
    cells = grid.cells if name in OVER_NATIVE_CELLS else F.adaptive_avg_pool2d(features, 14).flatten(2).transpose(1, 2)
    words = torch.randint(4, 11, (5, 6))
    packed = pack_padded_sequence(words[:, :-1], torch.tensor(LENGTHS), batch_first=True)
    return decoder, grid, cells, words, packed


def attention_equations(d, f14, words, weigh_cells=lambda attention: attention):
    """Xu et al. 2015, one caption: logits (T, V) and attention (T, P)."""
    (wq, wg, wr), (bq, bg, br) = d.from_hidden.weight.split(d.split_sizes), d.from_hidden.bias.split(d.split_sizes)
    from_x = torch.cat([d.word_gates.weight, d.context_gates.weight], 1)
    h, m = d.initial(f14.mean(0)).chunk(2)
    logits, attentions = [], []
    for word in words:
        e = d.score(torch.relu(d.key(f14) + wq @ h + bq))[:, 0]
        attention = e.softmax(0)
        z = torch.sigmoid(wg @ h + bg) * (weigh_cells(attention)[:, None] * f14).sum(0)
        x = torch.cat([d.embedding(word), z])
        h, m = (s[0] for s in torch.lstm_cell(x[None], (h[None], m[None]), from_x, wr, d.word_gates.bias, br))
        logits.append(d.output_layer(h))
        attentions.append(attention)
    return torch.stack(logits), torch.stack(attentions)


def show_and_tell_equations(d, f14, words):
    """Vinyals et al. 2015, one caption, in eval mode: logits (T, V). The photo, then the words, layer by layer."""
    r = d.recurrent
    step = {nn.LSTM: torch.lstm_cell, nn.GRU: torch.gru_cell, nn.RNN: torch.rnn_tanh_cell}[type(r)]
    xs = torch.cat([d.norm(d.photo_projection(f14.mean(0))[None]), d.embedding(words)])
    for layer in range(r.num_layers):
        weights = [getattr(r, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h, outputs = torch.zeros(1, r.hidden_size).double(), []
        memory = (h, h) if step is torch.lstm_cell else h
        for x in xs:
            memory = step(x[None], memory, *weights)
            outputs.append(memory[0][0] if step is torch.lstm_cell else memory[0])
        xs = torch.stack(outputs)
    return d.output_layer(xs[1:]), None


def adaptive_equations(d, f14, words):
    """Lu et al. 2017, one caption: logits (T, V) and (1 - beta_t) alpha_t (T, P)."""
    size = d.hidden_gates.in_features
    from_x = torch.cat([d.word_gates.weight, d.photo_gates.weight], 1)
    bias = d.word_gates.bias
    v, v_g = torch.relu(d.value(f14)), torch.relu(d.whole(f14.mean(0)))
    h = m = torch.zeros(1, size).double()
    logits, attentions = [], []
    for word in words:
        x = torch.cat([d.embedding(word), v_g])
        g = torch.sigmoid(from_x[4 * size :] @ x + bias[4 * size :] + d.hidden_gates.weight[4 * size :] @ h[0])
        weights = from_x[: 4 * size], d.hidden_gates.weight[: 4 * size], bias[: 4 * size], torch.zeros(28).double()
        h, m = torch.lstm_cell(x[None], (h, m), *weights)
        s = g * torch.tanh(m[0])
        z = torch.tanh(d.key(v) + d.query(h[0])) @ d.score.weight[0]
        z_s = torch.tanh(d.sentinel_key(s) + d.query(h[0])) @ d.score.weight[0]
        alpha, beta = z.softmax(0), torch.cat([z, z_s[None]]).softmax(0)[-1]
        c = beta * s + (1 - beta) * (alpha @ v)
        logits.append(d.output_layer(c + h[0]))
        attentions.append((1 - beta) * alpha)
    return torch.stack(logits), torch.stack(attentions)


def sinusoids(position, size):
    """Vaswani et al. 2017, section 3.5."""
    angles = [position / 10000 ** (2 * (i // 2) / size) for i in range(size)]
    waves = [math.cos(angle) if i % 2 else math.sin(angle) for i, angle in enumerate(angles)]
    return torch.tensor(waves, dtype=torch.float64)


def multi_head(query, keys, values, heads):
    """Vaswani et al. 2017, section 3.2: one head after the other. Rows of (., H) -> (., H), attention of each head."""
    size = query.shape[1] // heads
    outputs, attentions = [], []
    for columns in (slice(i * size, (i + 1) * size) for i in range(heads)):
        attentions.append((query[:, columns] @ keys[:, columns].T / size**0.5).softmax(1))
        outputs.append(attentions[-1] @ values[:, columns])
    return torch.cat(outputs, 1), torch.stack(attentions)


def native_positions(d, size):
    """The positions of the 8x8 native cells (64, H): means over the output rows and columns that read a cell."""
    pooling = pooling_matrix(8, 14)  # the share of a native row in each output row
    means = (pooling / pooling.sum(0)).T  # (8, 14)
    if hasattr(d.positions, "rows"):
        return ((means @ d.positions.rows)[:, None] + means @ d.positions.columns).flatten(0, 1)
    if not hasattr(d.positions, "size"):
        return torch.zeros(64, size).double()
    places = [float(mean @ torch.arange(14).double()) for mean in means]
    rows, columns = [[sinusoids(place, part) for place in places] for part in (size // 2, size - size // 2)]
    return torch.stack([torch.cat([row, column]) for row in rows for column in columns])


def transformer_cells(d, f14):
    """The encoder, one photo: f14 (196, C) -> (64, H). M2's memory slots: Cornia et al. 2020, section 3.1."""
    native = torch.tensor([0, 2, 4, 6, 7, 9, 11, 13])  # rows of the 14x14 map that show one native row alone
    f8 = f14.view(14, 14, -1)[native][:, native].flatten(0, 1)
    size = d.norm.weight.shape[0]
    x = torch.relu(d.cell_projection(f8)) + native_positions(d, size)
    for layer in d.encoder_layers:
        query, keys, values = layer.query_keys_values(layer.attention_norm(x)).chunk(3, 1)
        if layer.memory_slots is not None:
            more_keys, more_values = layer.memory_slots.chunk(2, 1)
            keys, values = torch.cat([keys, more_keys]), torch.cat([values, more_values])
        x = x + layer.attention_output(multi_head(query, keys, values, layer.heads)[0])
        x = x + layer.feed_forward[3](torch.relu(layer.feed_forward[0](layer.feed_forward_norm(x))))
    return d.encoder_norm(x)


def transformer_equations(d, f14, words):
    """Vaswani et al. 2017, pre-norm, one caption: logits (T, V), attention (T, P). Each word anew from its prefix."""
    pooling = grid_pooling(8, 8).double()
    cells = transformer_cells(d, f14)
    size = cells.shape[1]
    logits, attentions = [], []
    for length in range(1, len(words) + 1):
        x = torch.stack([d.word_projection(d.embedding(word)) * size**0.5 for word in words[:length]])
        x = x + torch.stack([sinusoids(t, size) for t in range(length)])
        for layer in d.layers:
            query, keys, values = layer.query_keys_values(layer.attention_norm(x)).chunk(3, 1)
            attended = [
                multi_head(query[t : t + 1], keys[: t + 1], values[: t + 1], layer.heads)[0] for t in range(length)
            ]
            x = x + layer.attention_output(torch.cat(attended))
            query = layer.cell_query(layer.cell_attention_norm(x))
            attended, attention = multi_head(query, *layer.cell_keys_values(cells).chunk(2, 1), layer.heads)
            x = x + layer.cell_attention_output(attended)
            x = x + layer.feed_forward[3](torch.relu(layer.feed_forward[0](layer.feed_forward_norm(x))))
        logits.append(d.output_layer(d.norm(x[-1])))
        shown = pooling @ attention[:, -1].mean(0)
        attentions.append(shown / shown.sum())
    return torch.stack(logits), torch.stack(attentions)


def updown_equations(d, f14, words):
    """Anderson et al. 2018, one caption: logits (T, V) and attention (T, P)."""
    size = d.query.in_features
    h1 = m1 = h2 = m2 = torch.zeros(1, size).double()
    from_word_and_photo = torch.cat([d.word_gates.weight, d.photo_gates.weight], 1)
    zeros = torch.zeros(4 * size).double()
    logits, attentions = [], []
    for word in words:
        (w_h2, w_h1), (v_h1, v_h2) = d.attention_gates.weight.split(size, 1), d.language_gates.weight.split(size, 1)
        x1 = torch.cat([d.embedding(word), f14.mean(0), h2[0]])[None]
        weights = torch.cat([from_word_and_photo, w_h2], 1), w_h1, d.word_gates.bias, zeros
        h1, m1 = torch.lstm_cell(x1, (h1, m1), *weights)
        attention = (torch.tanh(d.key(f14) + d.query.weight @ h1[0]) @ d.score.weight[0]).softmax(0)
        x2 = torch.cat([attention @ f14, h1[0]])[None]
        weights = torch.cat([d.context_gates.weight, v_h1], 1), v_h2, d.context_gates.bias, zeros
        h2, m2 = torch.lstm_cell(x2, (h2, m2), *weights)
        logits.append(d.output_layer(h2[0]))
        attentions.append(attention)
    return torch.stack(logits), torch.stack(attentions)


def x_linear_equations(d, cells, query):
    """Pan et al. 2020, one photo: F(k, v, q) (D,) and the spatial attention of each head (h, N)."""

    def projections(x, layer, norm):
        """ELU, then GroupNorm over each head, of W_k and W_v, or of W_q and W'_q: two (..., h, d)."""
        x = layer(x)
        x = torch.where(x > 0, x, torch.exp(x) - 1).unflatten(-1, (2 * d.heads, -1))
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return (x.flatten(-2) * norm.weight + norm.bias).unflatten(-1, (2, d.heads, -1)).unbind(-3)

    keys, values = projections(cells, d.cell, d.cell_norm)
    q, q_value = projections(query, d.query, d.query_norm)
    attended, attentions = [], []
    for head in range(d.heads):
        b = torch.relu(d.bilinear(keys[:, head] * q[head]))
        s = d.spatial(b)[:, 0].softmax(0)
        c = torch.sigmoid(d.channel(b.mean(0)))
        attended.append(c * (s[:, None] * (values[:, head] * q_value[head])).sum(0))
        attentions.append(s)
    return torch.cat(attended), torch.stack(attentions)


def xlan_equations(d, native, words):
    """Pan et al. 2020, one caption: logits (T, V) and attention (T, P), from the native cells."""
    cells = F.elu(d.cell(native))
    cells = cells + native_positions(d, cells.shape[1])
    photos = [cells.mean(0)]
    for layer in d.layers:
        photos.append(x_linear_equations(layer.attention, cells, photos[-1])[0])
        joint = torch.cat([layer.from_photo.weight, layer.from_cell.weight], 1)
        both = torch.cat([photos[-1].expand(len(cells), -1), cells], 1)
        cells = layer.norm(F.linear(both, joint, layer.from_photo.bias).relu() + cells)
    g = d.photo_norm(d.photo(torch.cat(photos)))
    h = m = torch.zeros(1, len(g)).double()
    c = torch.zeros(len(g)).double()
    from_x = torch.cat([d.word_gates.weight, d.context_gates.weight], 1)
    logits, attentions = [], []
    for word in words:
        x = torch.cat([d.embedding(word), g + c])[None]
        h, m = torch.lstm_cell(x, (h, m), from_x, d.hidden_gates.weight, d.word_gates.bias, torch.zeros(28).double())
        attended, spatial = x_linear_equations(d.attention, cells, h[0])
        value, gate = d.context(torch.cat([attended, h[0]])).chunk(2)
        c = value * torch.sigmoid(gate)
        logits.append(d.output_layer(c))
        spread = grid_pooling(8, 8).double() @ spatial.mean(0)
        attentions.append(spread / spread.sum())
    return torch.stack(logits), torch.stack(attentions)


def aoa_equations(d, native, words):
    """Huang et al. 2019, one caption: logits (T, V) and attention (T, P), from the native cells."""

    def attention_on_attention(layer, attended, query):
        (w_i, w_g), (b_i, b_g) = layer.weight.chunk(2), layer.bias.chunk(2)
        both = torch.cat([attended, query], -1)
        return torch.sigmoid(both @ w_g.T + b_g) * (both @ w_i.T + b_i)

    cells = torch.relu(d.cell(native))
    cells = cells + native_positions(d, cells.shape[1])
    for layer in d.layers:
        query, keys, values = layer.query_keys_values(cells).chunk(3, 1)
        attended = multi_head(query, keys, values, layer.heads)[0]
        cells = layer.norm(cells + attention_on_attention(layer.information, attended, query))
    keys, values = d.keys_values(cells).chunk(2, 1)
    size = cells.shape[1]
    h = m = torch.zeros(1, size).double()
    c = torch.zeros(size).double()
    from_x = torch.cat([d.word_gates.weight, d.context_gates.weight], 1)
    zeros = torch.zeros(4 * size).double()
    logits, attentions = [], []
    for word in words:
        x = torch.cat([d.embedding(word), cells.mean(0) + c])[None]
        h, m = torch.lstm_cell(x, (h, m), from_x, d.hidden_gates.weight, d.word_gates.bias, zeros)
        query = d.query(h)
        attended, attention = multi_head(query, keys, values, d.heads)
        c = attention_on_attention(d.information, attended, query)[0]
        logits.append(d.output_layer(c))
        spread = grid_pooling(8, 8).double() @ attention[:, 0].mean(0)
        attentions.append(spread / spread.sum())
    return torch.stack(logits), torch.stack(attentions)


EQUATIONS = {
    "transformer": transformer_equations,
    "attention": attention_equations,
    "hard-attention": attention_equations,
    "lstm": show_and_tell_equations,
    "adaptive": adaptive_equations,
    "updown": updown_equations,
    "xlan": xlan_equations,
    "aoa": aoa_equations,
}


def reference_output(variant, decoder, f14, words, packed):
    """The equations, caption by caption: logits (W, V), packed like the decoder's, and attention_sum (R, P) or None."""
    equations = EQUATIONS[variant.split(" ")[0]]
    step_starts = torch.cat([torch.zeros(1, dtype=torch.long), packed.batch_sizes.cumsum(0)[:-1]])
    logits, attention_sum = [None] * sum(LENGTHS), []
    if variant.split(" ")[0] in POSITIONS_IN_CELLS:
        f14 = f14 + grid_pooling(8, 8).double() @ native_positions(decoder, f14.shape[2])
    for row, length in enumerate(LENGTHS):
        caption_logits, attention = equations(decoder, f14[PHOTO[row]], words[row, :length])
        for index, values in zip((step_starts[:length] + row).tolist(), caption_logits, strict=True):
            logits[index] = values
        attention_sum.append(None if attention is None else attention.sum(0))
    return torch.stack(logits), torch.stack(attention_sum) if decoder.uses_coverage else None


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_the_equations_word_by_word(variant):
    decoder, grid, f14, words, packed = make(variant)
    decoder.eval()
    upstream = torch.randn(sum(LENGTHS), 11, dtype=torch.float64)
    gradients, outputs = [], []
    for logits, attention_sum in (
        decoder(grid, packed, PHOTO)[:2],
        reference_output(variant, decoder, f14, words, packed),
    ):
        decoder.zero_grad()
        loss = (logits * upstream).sum()
        if attention_sum is not None:
            loss = loss + (1 - attention_sum).square().mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
        outputs.append((logits, attention_sum))
    for output, reference in zip(*outputs, strict=True):
        assert (output is None) == (reference is None)
        if output is not None:
            torch.testing.assert_close(output, reference, rtol=1e-10, atol=1e-10)
    for (name, _), gradient, reference in zip(decoder.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10, msg=name)
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["learnt", "sinusoidal"])
@pytest.mark.parametrize("name", [name for name in DECODERS if name not in ("lstm", "transformer")])
def test_positions_are_added_to_the_cells_as_the_equations_do(name, kind):
    test_logits_and_gradients_equal_the_equations_word_by_word(f"{name} --positions {kind}")
    decoders = [make(f"{name} --positions {positions}") for positions in (kind, "none")]
    with_positions, without = (decoder.eval()(grid, packed, PHOTO).logits for decoder, grid, *_, packed in decoders)
    assert kind == "learnt" or (with_positions - without).abs().max() > 1e-4, "they tell the cells apart"


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant.startswith("lstm")])
def test_a_recurrent_network_computes_in_float32_where_cudnn_would_in_float16(variant, monkeypatch):
    """In bfloat16 on a GPU, autocast gives cuDNN float16, in which gradients that are not scaled underflow."""
    decoder, grid, _, _, packed = make(variant)
    decoder.float().eval()
    grid = Grid(grid.cells.float(), grid.pooling.float())
    monkeypatch.setattr("captioning.decoders.lstm.cudnn_takes_float16", lambda device_type: True)
    seen = []
    decoder.recurrent.register_forward_pre_hook(
        lambda module, inputs: seen.append(
            (torch.is_autocast_enabled("cpu"), {t.dtype for t in tree_leaves(inputs) if is_floating(t)})
        )
    )
    with torch.autocast("cpu", torch.bfloat16):
        decoder(grid, packed, PHOTO)
        state = decoder.init_state(grid)
        decoder.step(torch.ones(3, dtype=torch.long), state)
    assert len(seen) == 4 and all(found == (False, {torch.float32}) for found in seen)


def is_floating(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_finite_differences(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.eval()
    names = [name for name, _ in decoder.named_parameters()]

    def logits(cells, *parameters):
        output = torch.func.functional_call(
            decoder, dict(zip(names, parameters, strict=True)), (Grid(cells, grid.pooling), packed, PHOTO)
        )
        return output.logits

    inputs = grid.cells.requires_grad_(), *decoder.parameters()
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


def test_hard_attention_uses_the_likeliest_cell_or_the_expectation_outside_training():
    decoder, grid, f14, words, _ = make("hard-attention")
    decoder.eval()
    expectation, _ = attention_equations(decoder, f14[0], words[0])
    argmax, _ = attention_equations(
        decoder, f14[0], words[0], lambda attention: F.one_hot(attention.argmax(), 196).double()
    )
    assert (expectation - argmax).abs().max() > 1e-3
    for mode, expected in (("expectation", expectation), ("argmax", argmax)):
        decoder.attention_mode = mode
        state = decoder.init_state(grid.select(torch.tensor([0])))
        for word, logits in zip(words[0], expected, strict=True):
            log_probabilities, _, state, samples = decoder.step(word[None], state)
            torch.testing.assert_close(log_probabilities[0], logits.log_softmax(0))
            assert samples is None


def test_hard_attention_samples_one_cell_per_word_for_half_of_the_photos_in_training(monkeypatch):
    decoder, grid, _, _, packed = make("hard-attention")
    cell_weights, attend = [], Grid.attend

    def recording_attend(grid, weights):
        cell_weights.append(weights)
        return attend(grid, weights)

    monkeypatch.setattr(Grid, "attend", recording_attend)
    decoder.train()
    photo_of_word = torch.cat([PHOTO[:rows] for rows in packed.batch_sizes.tolist()])
    sampled = []  # of each photo in each batch
    for _ in range(40):
        cell_weights.clear()
        samples = decoder(grid, packed, PHOTO).samples
        is_one_hot = torch.cat([weights.flatten(0, 1).amax(1) == 1 for weights in cell_weights])  # (W,)
        assert torch.equal(samples.log_probability < 0, is_one_hot)
        assert (samples.entropy > 0).all() and samples.log_probability.requires_grad
        by_photo = [is_one_hot[photo_of_word == photo] for photo in range(3)]
        assert all(words.unique().numel() == 1 for words in by_photo), "all words of a photo sample, or none"
        sampled += [bool(words[0]) for words in by_photo]
    assert 0.3 < sum(sampled) / len(sampled) < 0.7
    assert HardAttentionDecoder.expectation_fraction == 0.5


def assert_steps_equal_teacher_forcing(variant):
    decoder, grid, _, words, packed = make(variant)
    decoder.eval()
    logits = decoder(grid, packed, PHOTO).logits
    state = decoder.init_state(grid.select(PHOTO))
    step_sizes = packed.batch_sizes.tolist()
    for t, step_logits in enumerate(logits.split(step_sizes)):
        step = decoder.step(words[:, t], state)
        expected = step_logits.log_softmax(1)
        torch.testing.assert_close(step.log_probabilities[: step_sizes[t]], expected, rtol=1e-5, atol=1e-6)
        state = step.state


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_teacher_forcing(variant):
    assert_steps_equal_teacher_forcing(variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_beams_in_one_batch_equal_photos_one_by_one(variant):
    decoder, grid, _, words, _ = make(variant)
    decoder.eval()
    state = decoder.init_state(grid).reorder(torch.tensor([0, 0, 1, 1, 2, 2]))  # two beams per photo
    beam_words = words[:, 0].repeat(2)[:6]
    step = decoder.step(beam_words, state)
    for row in range(6):
        photo_state = decoder.init_state(grid.select(torch.tensor([row // 2])))
        alone = decoder.step(beam_words[row : row + 1], photo_state)
        torch.testing.assert_close(step.log_probabilities[row], alone.log_probabilities[0], rtol=1e-5, atol=1e-6)
        if step.attention is not None:
            torch.testing.assert_close(step.attention[row], alone.attention[0])


@pytest.mark.parametrize("name", [name for name in DECODERS if DECODERS[name].uses_attention])
def test_the_attention_of_each_word_equals_the_equations(name):
    decoder, grid, f14, words, _ = make(name)
    decoder.eval()
    _, expected = EQUATIONS[name](decoder, f14[2], words[0])
    state = decoder.init_state(grid.select(torch.tensor([2])))
    for word, expected_attention in zip(words[0], expected, strict=True):
        _, attention, state, _ = decoder.step(word[None], state)
        torch.testing.assert_close(attention[0], expected_attention)
    sums = expected.sum(1)
    if name == "adaptive":
        assert (sums < 0.999).all() and (sums > 0).all() and sums.std() > 0, "each word has its sentinel weight"
    else:
        torch.testing.assert_close(sums, torch.ones(len(sums), dtype=torch.float64))


@pytest.mark.parametrize("height, width", [(7, 7), (8, 8), (5, 9), (5, 12), (14, 14), (16, 16), (1, 1)])
def test_attention_to_native_cells_is_shown_as_weights_that_sum_to_one_and_equal_ones_stay_equal(height, width):
    pooling = grid_pooling(height, width).double().expand(2, -1, -1)
    cells = height * width
    uniform = torch.full((2, 3, cells), 1 / cells, dtype=torch.float64)  # three captions per photo
    equal = torch.full((6, 196), 1 / 196, dtype=torch.float64)
    torch.testing.assert_close(spread_attention(uniform, pooling), equal, rtol=1e-10, atol=1e-10)
    shown = spread_attention(torch.randn(2, 3, cells, dtype=torch.float64).softmax(2), pooling)
    torch.testing.assert_close(shown.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert (shown >= 0).all()
    one_cell = torch.eye(cells, dtype=torch.float64).expand(2, -1, -1)  # caption k attends to cell k alone
    shown = spread_attention(one_cell, pooling).view(2, cells, 196)
    torch.testing.assert_close(shown.sum(2), torch.ones(2, cells, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert ((shown > 0) == (pooling.mT > 0)).all(), "on the output cells that read the native one, and no others"


def test_attention_to_the_top_left_cell_is_shown_at_the_top_left():
    shown = spread_attention(torch.eye(64)[None, :1], grid_pooling(8, 8)[None]).view(14, 14)
    assert shown.argmax() == 0 and shown[:2, :2].sum() == pytest.approx(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_one_photo_trains(variant):
    decoder, grid, _, words, _ = make(variant)
    packed = pack_padded_sequence(words[:1, :3], torch.tensor([3]), batch_first=True)
    logits = decoder.train()(grid.select(torch.tensor([0])), packed, torch.tensor([0])).logits
    logits.sum().backward()
    assert logits.isfinite().all()


def test_the_example_decoder_in_the_docstring_of_the_protocol_works(monkeypatch):
    source = re.search(r"^    class GruDecoder.*?(?=^\S)", protocol.__doc__, re.DOTALL | re.MULTILINE).group()
    namespace = {**vars(protocol), "F": F}
    exec(textwrap.dedent(source), namespace)
    monkeypatch.setitem(DECODERS._entries, "gru", namespace["GruDecoder"])
    assert_steps_equal_teacher_forcing("gru")
