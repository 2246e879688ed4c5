"""The decoders against their papers' equations, written plainly: a word at a time, on the whole 14x14 map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from captioning.decoders import DECODERS, build_decoder
from captioning.grid import Grid, grid_pooling
from captioning.objectives import CrossEntropy, Share

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


def make(name, seed=0):
    torch.manual_seed(seed)
    decoder = build_decoder(name, SIZES).double()
    features = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    grid = Grid(features.flatten(2).transpose(1, 2), grid_pooling(8, 8).double())
    f14 = F.adaptive_avg_pool2d(features, 14).flatten(2).transpose(1, 2)
    words = torch.randint(4, 11, (5, 6))
    packed = pack_padded_sequence(words[:, :-1], torch.tensor(LENGTHS), batch_first=True)
    return decoder, grid, f14, words, packed


def attend(d, f14, words):
    """Xu et al. 2015, one caption: scores (T, V) and attention (T, P), with torch.nn.LSTMCell."""
    a, c, _ = d.parts
    hidden_size = d.from_hidden.in_features
    query, gate, recurrent = zip(d.from_hidden.weight.split(d.parts), d.from_hidden.bias.split(d.parts), strict=True)
    cell = nn.LSTMCell(d.word_gates.in_features + c, hidden_size).double()
    cell.weight_ih = nn.Parameter(torch.cat([d.word_gates.weight, d.context_gates.weight], 1))
    cell.bias_ih, cell.weight_hh, cell.bias_hh = (
        d.word_gates.bias,
        nn.Parameter(recurrent[0]),
        nn.Parameter(recurrent[1]),
    )
    h, m = d.initial(f14.mean(0)).split(hidden_size)
    scores, attentions = [], []
    for word in words:
        e = torch.stack([d.score(torch.relu(d.key(cell14) + F.linear(h, *query))) for cell14 in f14])[:, 0]
        attention = e.softmax(0)
        z = torch.sigmoid(F.linear(h, *gate)) * (attention[:, None] * f14).sum(0)
        h, m = (x[0] for x in cell(torch.cat([d.embedding(word), z])[None], (h[None], m[None])))
        scores.append(d.vocabulary(h))
        attentions.append(attention)
    return torch.stack(scores), torch.stack(attentions)


def read_photo_first(d, f14, words):
    """Vinyals et al. 2015, one caption of a decoder in eval mode: the photo, then the words, through torch.nn.LSTM."""
    x = torch.cat([d.norm(d.image(f14.mean(0))[None]), d.embedding(words)])
    return d.vocabulary(d.lstm(x)[0][1:]), None


def look_when_needed(d, f14, words):
    """Lu et al. 2017, one caption: scores (T, V) and (1 - beta_t) alpha_t (T, P), with torch.nn.LSTMCell."""
    hidden_size = d.hidden_gates.in_features
    cell = nn.LSTMCell(2 * d.embedding.embedding_dim, hidden_size).double()
    from_x = torch.cat([d.word_gates.weight, d.photo_gates.weight], 1)
    cell.weight_ih, cell.weight_hh = (nn.Parameter(w[: 4 * hidden_size]) for w in (from_x, d.hidden_gates.weight))
    cell.bias_ih, cell.bias_hh = (
        nn.Parameter(d.word_gates.bias[: 4 * hidden_size]),
        nn.Parameter(torch.zeros(28).double()),
    )
    v, v_g = torch.relu(d.value(f14)), torch.relu(d.whole(f14.mean(0)))
    h = m = torch.zeros(1, hidden_size, dtype=torch.float64)
    scores, attentions = [], []
    for word in words:
        x = torch.cat([d.embedding(word), v_g])
        g = torch.sigmoid(from_x[4 * hidden_size :] @ x + d.word_gates.bias[4 * hidden_size :]
                          + d.hidden_gates.weight[4 * hidden_size :] @ h[0])  # fmt: skip
        h, m = cell(x[None], (h, m))
        s = g * torch.tanh(m[0])
        z = torch.tanh(d.key(v) + d.query(h[0])) @ d.score.weight[0]
        z_s = torch.tanh(d.sentinel_key(s) + d.query(h[0])) @ d.score.weight[0]
        alpha, beta = z.softmax(0), torch.cat([z, z_s[None]]).softmax(0)[-1]
        c = beta * s + (1 - beta) * (alpha @ v)
        scores.append(d.vocabulary(c + h[0]))
        attentions.append((1 - beta) * alpha)
    return torch.stack(scores), torch.stack(attentions)


PLAIN = {"attention": attend, "lstm": read_photo_first, "adaptive": look_when_needed}


@pytest.mark.parametrize("name", DECODERS)
def test_teacher_forced_scores_equal_the_equations_a_word_at_a_time(name):
    decoder, grid, f14, words, packed = make(name)
    decoder.eval()
    scores, coverage = decoder(grid, packed, PHOTO)
    first_of_step = torch.cat([torch.zeros(1, dtype=torch.long), packed.batch_sizes.cumsum(0)[:-1]])
    for row, length in enumerate(LENGTHS):
        plain, attention = PLAIN[name](decoder, f14[PHOTO[row]], words[row, :length])
        torch.testing.assert_close(scores[first_of_step[:length] + row], plain, rtol=1e-10, atol=1e-10)
        if coverage is not None:
            torch.testing.assert_close(coverage[row], attention.sum(0), rtol=1e-10, atol=1e-10)


def test_gradients_of_the_attention_decoder_equal_those_of_the_equations():
    decoder, grid, f14, words, packed = make("attention")
    targets = torch.randint(0, 11, (sum(LENGTHS),))
    scores, coverage = decoder(grid, packed, PHOTO)
    loss = F.cross_entropy(scores, targets) + (1 - coverage).square().mean()
    loss.backward()
    ours = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    shadow = make("attention")[0]
    first_of_step = torch.cat([torch.zeros(1, dtype=torch.long), packed.batch_sizes.cumsum(0)[:-1]])
    total, terms = 0, []
    for row, length in enumerate(LENGTHS):  # through the parts, since nn.Parameter cuts the graph
        plain, attention = differentiable_attend(shadow, f14[PHOTO[row]], words[row, :length])
        total = total + F.cross_entropy(plain, targets[first_of_step[:length] + row], reduction="sum")
        terms.append((1 - attention.sum(0)).square())
    plain_loss = total / sum(LENGTHS) + torch.stack(terms).mean()
    torch.testing.assert_close(loss, plain_loss, rtol=1e-10, atol=1e-10)
    plain_loss.backward()
    for name, parameter in shadow.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-10, msg=name)


def differentiable_attend(d, f14, words):
    """`attend` with the LSTM's gates written out, so that gradients reach every parameter."""
    (wq, wg, wr), (bq, bg, br) = d.from_hidden.weight.split(d.parts), d.from_hidden.bias.split(d.parts)
    h, m = d.initial(f14.mean(0)).chunk(2)
    scores, attentions = [], []
    for word in words:
        attention = (torch.relu(d.key(f14) + wq @ h + bq) @ d.score.weight[0]).softmax(0)
        z = torch.sigmoid(wg @ h + bg) * (attention @ f14)
        i, f, g, o = (d.word_gates(d.embedding(word)) + d.context_gates(z) + wr @ h + br).chunk(4)
        m = f.sigmoid() * m + i.sigmoid() * g.tanh()
        h = o.sigmoid() * m.tanh()
        scores.append(d.vocabulary(h))
        attentions.append(attention)
    return torch.stack(scores), torch.stack(attentions)


@pytest.mark.parametrize("name", DECODERS)
def test_steps_equal_teacher_forcing(name):
    decoder, grid, _, words, packed = make(name)
    decoder.eval()
    scores, _ = decoder(grid, packed, PHOTO)
    state = decoder.begin(grid.select(PHOTO))
    first = 0
    for t, rows in enumerate(packed.batch_sizes.tolist()):
        step = decoder.step(words[:, t], state)
        expected = scores[first : first + rows].log_softmax(1)
        torch.testing.assert_close(step.log_probabilities[:rows], expected, rtol=1e-5, atol=1e-6)
        state, first = step.state, first + rows


@pytest.mark.parametrize("name", DECODERS)
def test_beams_side_by_side_equal_photos_one_by_one(name):
    decoder, grid, _, words, _ = make(name)
    decoder.eval()
    together = decoder.begin(grid)
    together = together.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))  # two beams a photo
    step = decoder.step(words[:, 0].repeat(2)[:6], together)
    for row in range(6):
        alone = decoder.step(words[:, 0].repeat(2)[row : row + 1], decoder.begin(grid.select(torch.tensor([row // 2]))))
        torch.testing.assert_close(step.log_probabilities[row], alone.log_probabilities[0], rtol=1e-5, atol=1e-6)
        if step.attention is not None:
            torch.testing.assert_close(step.attention[row], alone.attention[0])


@pytest.mark.parametrize("name", [name for name in DECODERS if DECODERS[name].sees_cells])
def test_the_attention_of_each_word_is_the_equations(name):
    decoder, grid, f14, words, _ = make(name)
    decoder.eval()
    _, expected = PLAIN[name](decoder, f14[2], words[0])
    state = decoder.begin(grid.select(torch.tensor([2])))
    for word, attention in zip(words[0], expected, strict=True):
        _, found, state = decoder.step(word[None], state)
        torch.testing.assert_close(found[0], attention)
    sums = expected.sum(1)
    if name == "adaptive":
        assert (sums < 0.999).all() and (sums > 0).all() and sums.std() > 0, (
            "the sentinel takes its share, word by word"
        )
    else:
        torch.testing.assert_close(sums, torch.ones(len(sums), dtype=torch.float64))


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_of_one_photo_trains(name):
    decoder, grid, _, words, _ = make(name)
    packed = pack_padded_sequence(words[:1, :3], torch.tensor([3]), batch_first=True)
    scores, _ = decoder.train()(grid.select(torch.tensor([0])), packed, torch.tensor([0]))
    scores.sum().backward()
    assert scores.isfinite().all()


def test_the_objective_is_cross_entropy_plus_the_doubly_stochastic_term():
    decoder, grid, _, _, packed = make("attention")
    targets = torch.randint(0, 11, (sum(LENGTHS),))
    batch = type("Batch", (), {"words": packed, "targets": targets, "photo": PHOTO})
    scores, coverage = decoder(grid, packed, PHOTO)
    for alpha_c in (0.0, 1.0, 0.5):
        loss = CrossEntropy(alpha_c).loss(decoder, grid, batch, Share())
        expected = F.cross_entropy(scores, targets)
        torch.testing.assert_close(loss.cross_entropy, expected)
        torch.testing.assert_close(loss.objective, expected + alpha_c * ((1 - coverage) ** 2).mean())
    top5 = (scores.detach().topk(5).indices == targets[:, None]).any(1).float().mean()
    torch.testing.assert_close(loss.top5, top5.float())
