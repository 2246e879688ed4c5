"""The decoders against their papers' equations, written plainly: a word at a time, on the whole 14x14 map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from captioning.decoders import DECODERS
from captioning.decoders.factory import build_decoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.encoders.grid import Grid, grid_pooling

SIZES = {
    "vocabulary_size": 11,
    "channels": 6,
    "embedding_size": 5,
    "attention_size": 4,
    "hidden_size": 7,
    "dropout": 0.0,
}
LENGTHS = [5, 4, 4, 2, 1]
PHOTO = torch.tensor([1, 0, 2, 1, 0])  # whose caption each is


VARIANTS = [
    *DECODERS,
    "lstm --cell gru",
    "lstm --cell rnn --layers 2",
    "lstm --layers 3 --photo_norm none",
]


def make(variant, seed=0):
    torch.manual_seed(seed)
    name, *flags = variant.split(" --")
    settings = {key: int(value) if value.isdigit() else value for key, value in map(str.split, flags)}
    decoder = build_decoder(name, {**SIZES, **settings}).double()
    features = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    grid = Grid(features.flatten(2).transpose(1, 2), grid_pooling(8, 8).double())
    f14 = F.adaptive_avg_pool2d(features, 14).flatten(2).transpose(1, 2)
    words = torch.randint(4, 11, (5, 6))
    packed = pack_padded_sequence(words[:, :-1], torch.tensor(LENGTHS), batch_first=True)
    return decoder, grid, f14, words, packed


def attend(d, f14, words, looks=lambda attention: attention):
    """Xu et al. 2015, one caption: scores (T, V) and attention (T, P)."""
    (wq, wg, wr), (bq, bg, br) = d.from_hidden.weight.split(d.parts), d.from_hidden.bias.split(d.parts)
    from_x = torch.cat([d.word_gates.weight, d.context_gates.weight], 1)
    h, m = d.initial(f14.mean(0)).chunk(2)
    scores, attentions = [], []
    for word in words:
        e = torch.cat([d.score(torch.relu(d.key(cell14) + wq @ h + bq)) for cell14 in f14])
        attention = e.softmax(0)
        z = torch.sigmoid(wg @ h + bg) * (looks(attention)[:, None] * f14).sum(0)
        x = torch.cat([d.embedding(word), z])
        h, m = (s[0] for s in torch.lstm_cell(x[None], (h[None], m[None]), from_x, wr, d.word_gates.bias, br))
        scores.append(d.output_layer(h))
        attentions.append(attention)
    return torch.stack(scores), torch.stack(attentions)


def read_photo_first(d, f14, words):
    """Vinyals et al. 2015, one caption of a decoder in eval mode: the photo, then the words, a layer at a time."""
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


def look_when_needed(d, f14, words):
    """Lu et al. 2017, one caption: scores (T, V) and (1 - beta_t) alpha_t (T, P)."""
    size = d.hidden_gates.in_features
    from_x = torch.cat([d.word_gates.weight, d.photo_gates.weight], 1)
    bias = d.word_gates.bias
    v, v_g = torch.relu(d.value(f14)), torch.relu(d.whole(f14.mean(0)))
    h = m = torch.zeros(1, size).double()
    scores, attentions = [], []
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
        scores.append(d.output_layer(c + h[0]))
        attentions.append((1 - beta) * alpha)
    return torch.stack(scores), torch.stack(attentions)


PLAIN = {"attention": attend, "hard-attention": attend, "lstm": read_photo_first, "adaptive": look_when_needed}


def plain_scores(variant, decoder, f14, words, packed):
    """The equations, caption by caption -> scores packed as the decoder's, and coverage (R, P)."""
    first_of_step = torch.cat([torch.zeros(1, dtype=torch.long), packed.batch_sizes.cumsum(0)[:-1]])
    scores, attention_sum = [None] * sum(LENGTHS), []
    for row, length in enumerate(LENGTHS):
        plain, attention = PLAIN[variant.split(" ")[0]](decoder, f14[PHOTO[row]], words[row, :length])
        for place, values in zip((first_of_step[:length] + row).tolist(), plain, strict=True):
            scores[place] = values
        attention_sum.append(None if attention is None else attention.sum(0))
    return torch.stack(scores), torch.stack(attention_sum) if decoder.uses_coverage else None


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_and_gradients_equal_those_of_the_equations_a_word_at_a_time(variant):
    decoder, grid, f14, words, packed = make(variant)
    decoder.eval()
    upstream = torch.randn(sum(LENGTHS), 11, dtype=torch.float64)
    gradients, found = [], []
    for scores, attention_sum in (decoder(grid, packed, PHOTO)[:2], plain_scores(variant, decoder, f14, words, packed)):
        decoder.zero_grad()
        total = (scores * upstream).sum() + (0 if attention_sum is None else (1 - attention_sum).square().mean())
        total.backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
        found.append((scores, attention_sum))
    for ours, plain in zip(*found, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    for (name, _), ours, plain in zip(decoder.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10, msg=name)
        assert ours.abs().sum() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_finite_differences(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.eval()
    names = [name for name, _ in decoder.named_parameters()]

    def scores(cells, *parameters):
        taught = torch.func.functional_call(
            decoder, dict(zip(names, parameters, strict=True)), (Grid(cells, grid.pooling), packed, PHOTO)
        )
        return taught.logits

    inputs = grid.cells.requires_grad_(), *decoder.parameters()
    assert torch.autograd.gradcheck(scores, inputs, fast_mode=True)


def test_hard_attention_sees_the_likeliest_cell_or_the_expectation_when_it_captions():
    decoder, grid, f14, words, _ = make("hard-attention")
    decoder.eval()
    expectation, _ = attend(decoder, f14[0], words[0])
    argmax, _ = attend(decoder, f14[0], words[0], lambda attention: F.one_hot(attention.argmax(), 196).double())
    assert (expectation - argmax).abs().max() > 1e-3
    for sees, expected in (("expectation", expectation), ("argmax", argmax)):
        decoder.sees = sees
        state = decoder.init_state(grid.select(torch.tensor([0])))
        for word, scores in zip(words[0], expected, strict=True):
            log_probabilities, _, state, choices = decoder.step(word[None], state)
            torch.testing.assert_close(log_probabilities[0], scores.log_softmax(0))
            assert choices is None


def test_hard_attention_draws_one_cell_a_word_in_training_for_half_of_the_photos(monkeypatch):
    decoder, grid, _, _, packed = make("hard-attention")
    seen = []
    monkeypatch.setattr(
        Grid, "attend", lambda grid, weights, attend=Grid.attend: seen.append(weights) or attend(grid, weights)
    )
    decoder.train()
    drawn = []
    for _ in range(40):
        seen.clear()
        choices = decoder(grid, packed, PHOTO).choices
        ones = torch.cat([weights.flatten(0, 1).amax(1) == 1 for weights in seen])  # (W,)
        assert torch.equal(choices.log_probability < 0, ones)
        assert (choices.entropy > 0).all() and choices.log_probability.requires_grad
        photos = torch.cat([PHOTO[:rows] for rows in packed.batch_sizes.tolist()])
        assert all(ones[photos == photo].unique().numel() == 1 for photo in range(3)), "a photo's words go together"
        drawn += [bool(ones[photos == photo][0]) for photo in range(3)]
    assert 0.3 < sum(drawn) / len(drawn) < 0.7
    assert HardAttentionDecoder.expected_share == 0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_equal_teacher_forcing(name):
    decoder, grid, _, words, packed = make(name)
    decoder.eval()
    scores, *_ = decoder(grid, packed, PHOTO)
    state = decoder.init_state(grid.select(PHOTO))
    first = 0
    for t, rows in enumerate(packed.batch_sizes.tolist()):
        step = decoder.step(words[:, t], state)
        expected = scores[first : first + rows].log_softmax(1)
        torch.testing.assert_close(step.log_probabilities[:rows], expected, rtol=1e-5, atol=1e-6)
        state, first = step.state, first + rows


@pytest.mark.parametrize("name", VARIANTS)
def test_beams_side_by_side_equal_photos_one_by_one(name):
    decoder, grid, _, words, _ = make(name)
    decoder.eval()
    together = decoder.init_state(grid)
    together = together.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))  # two beams a photo
    step = decoder.step(words[:, 0].repeat(2)[:6], together)
    for row in range(6):
        alone = decoder.step(
            words[:, 0].repeat(2)[row : row + 1], decoder.init_state(grid.select(torch.tensor([row // 2])))
        )
        torch.testing.assert_close(step.log_probabilities[row], alone.log_probabilities[0], rtol=1e-5, atol=1e-6)
        if step.attention is not None:
            torch.testing.assert_close(step.attention[row], alone.attention[0])


@pytest.mark.parametrize("name", [name for name in DECODERS if DECODERS[name].uses_attention])
def test_the_attention_of_each_word_is_the_equations(name):
    decoder, grid, f14, words, _ = make(name)
    decoder.eval()
    _, expected = PLAIN[name](decoder, f14[2], words[0])
    state = decoder.init_state(grid.select(torch.tensor([2])))
    for word, attention in zip(words[0], expected, strict=True):
        _, found, state, _ = decoder.step(word[None], state)
        torch.testing.assert_close(found[0], attention)
    sums = expected.sum(1)
    if name == "adaptive":
        assert (sums < 0.999).all() and (sums > 0).all() and sums.std() > 0, (
            "the sentinel takes its share, word by word"
        )
    else:
        torch.testing.assert_close(sums, torch.ones(len(sums), dtype=torch.float64))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_of_one_photo_trains(name):
    decoder, grid, _, words, _ = make(name)
    packed = pack_padded_sequence(words[:1, :3], torch.tensor([3]), batch_first=True)
    scores, *_ = decoder.train()(grid.select(torch.tensor([0])), packed, torch.tensor([0]))
    scores.sum().backward()
    assert scores.isfinite().all()
