// The released model in plain JavaScript: unpack the weights, text to tokens, one step of the network, choose a token.
//
// - Weights are whole numbers of one byte with one scale a row, as blm_core/evidence/page.py packs them
// - A decoder of the Llama family; blm_core/model.py is the same arithmetic in PyTorch
// - Keys and values are kept per position, so that any position can be read again
// - Nothing is asked of the network
"use strict";

const SPACE_MARK = "\u2581"; // sentencepiece writes a space as this character
const SLICE = 1 << 20; // characters of base64 decoded at once; a multiple of four

// The bytes that were packed as base64 of a zlib stream; `progress` is called with the fraction done and may be waited for.
async function inflate(base64, progress = () => {}) {
  const { readable, writable } = new DecompressionStream("deflate");
  const writer = writable.getWriter();
  const read = new Response(readable).arrayBuffer();
  for (let at = 0; at < base64.length; at += SLICE) {
    const binary = atob(base64.slice(at, at + SLICE));
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
    await Promise.race([writer.write(bytes), read]); // damaged data ends the reading side with an error
    await progress(Math.min(1, (at + SLICE) / base64.length));
  }
  await Promise.race([writer.close(), read]);
  return read;
}

// y = W x
function multiply({ rows, columns, values }, x, y) {
  for (let row = 0, at = 0; row < rows; row++) {
    let a = 0, b = 0, c = 0, d = 0, i = 0; // four sums, so that no addition waits for the one before
    for (; i + 3 < columns; i += 4, at += 4) {
      a += values[at] * x[i];
      b += values[at + 1] * x[i + 1];
      c += values[at + 2] * x[i + 2];
      d += values[at + 3] * x[i + 3];
    }
    for (; i < columns; i++, at++) a += values[at] * x[i];
    y[row] = a + b + c + d;
  }
  return y;
}

function softmax(scores, length = scores.length, temperature = 1) {
  let top = -Infinity, sum = 0;
  for (let i = 0; i < length; i++) if (scores[i] > top) top = scores[i];
  for (let i = 0; i < length; i++) sum += scores[i] = Math.exp((scores[i] - top) / temperature);
  for (let i = 0; i < length; i++) scores[i] /= sum;
  return scores;
}

const probabilities = (logits) => softmax(Float32Array.from(logits));

// A number in [0, 1) that depends on seed and position alone: a story that goes on from a changed word keeps its numbers.
function random(seed, position) {
  let h = Math.imul(seed ^ 0x9e3779b9, 0x85ebca6b) ^ Math.imul(position + 1, 0xc2b2ae35);
  h = Math.imul(h ^ (h >>> 16), 0x7feb352d);
  h = Math.imul(h ^ (h >>> 15), 0x846ca68b);
  return ((h ^ (h >>> 16)) >>> 0) / 2 ** 32;
}

// The tokens with the largest of the probabilities `p`, best first.
function likeliest(p, count) {
  const best = [];
  for (let token = 0; token < p.length; token++) {
    if (best.length === count && p[token] <= p[best[count - 1]]) continue;
    let at = Math.min(best.length, count - 1);
    for (; at > 0 && p[best[at - 1]] < p[token]; at--) best[at] = best[at - 1];
    best[at] = token;
  }
  return best;
}

// Draw from the likeliest tokens that together reach `topP`; temperature 0 takes the likeliest.
function choose(logits, { temperature, topP }, drawn) {
  if (temperature === 0) return likeliest(logits, 1)[0];
  const p = softmax(Float32Array.from(logits), logits.length, temperature);
  const least = (1 - topP) / p.length; // all tokens below this have less than 1 - topP together: none is needed
  const kept = [...p.keys()].filter((token) => p[token] >= least).sort((a, b) => p[b] - p[a]);
  let mass = 0, count = 0;
  while (count < kept.length && mass < topP) mass += p[kept[count++]];
  let left = drawn * mass;
  return kept.find((token, i) => (left -= p[token]) < 0 || i === count - 1);
}

class Model {
  static async load(base64, progress) {
    return new Model(await inflate(base64, progress));
  }

  // `buffer`: length of the header, header (JSON), all float32 numbers, all whole numbers.
  constructor(buffer) {
    const size = new Uint32Array(buffer, 0, 1)[0];
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
    Object.assign(this, header); // config, vocabulary, sampling, heads
    this.weights = {};
    let at = 4 + size;
    for (const { name, rows } of header.tensors) { // gains of norms, and the scales of a matrix's rows
      this.weights[name] = new Float32Array(buffer, at, rows);
      at += 4 * rows;
    }
    for (const { name, rows, columns } of header.tensors.filter((tensor) => tensor.columns)) {
      const scales = this.weights[name];
      const values = Float32Array.from(new Int8Array(buffer, at, rows * columns)); // a third faster than whole numbers
      for (let i = 0; i < values.length; i++) values[i] *= scales[Math.floor(i / columns)];
      this.weights[name] = { rows, columns, values };
      at += rows * columns;
    }
    this.prepareVocabulary();
    this.prepareState();
  }

  prepareVocabulary() {
    const { pieces, scores, bytes } = this.vocabulary;
    this.ids = new Map();
    this.scores = new Map();
    pieces.forEach((piece, id) => {
      if (piece === null) return; // a byte or a control symbol, which no text spells
      this.ids.set(piece, id);
      this.scores.set(piece, scores[id]);
    });
    this.byteOf = new Map(bytes.map((id, byte) => [id, byte]));
  }

  prepareState() {
    const { n_layers, n_heads, n_kv_heads, d_head, d_model, d_ff, vocab_size, seq_len, rope_base } = this.config;
    const numbers = (length) => new Float32Array(length);
    this.keys = Array.from({ length: n_layers }, () => numbers(seq_len * n_kv_heads * d_head));
    this.values = Array.from({ length: n_layers }, () => numbers(seq_len * n_kv_heads * d_head));
    this.attention = Array.from({ length: n_layers }, () => Array.from({ length: n_heads }, () => numbers(seq_len)));
    this.off = new Set(); // "layer.head", counted from 0: heads that write nothing
    this.x = numbers(d_model), this.normed = numbers(d_model), this.added = numbers(d_model);
    this.q = numbers(n_heads * d_head), this.mixed = numbers(n_heads * d_head);
    this.gate = numbers(d_ff), this.up = numbers(d_ff);
    this.logits = numbers(vocab_size);
    this.turns = Array.from({ length: d_head / 2 }, (_, i) => rope_base ** ((-2 * i) / d_head));
  }

  // Token ids of `text`, those that sentencepiece gives.
  encode(text) {
    const spell = (part) => [...new TextEncoder().encode(part)].map((byte) => this.vocabulary.bytes[byte]);
    return text.split(/(\u2581|\n)/).flatMap((part) => {
      if (part === SPACE_MARK) return spell(part); // a literal mark is no space
      if (part === "\n") return [this.ids.get(part)];
      // No learned piece goes on behind a word's end, so that words can be merged one by one.
      const words = part.replaceAll(" ", SPACE_MARK).split(/(?<=[^\u2581])(?=\u2581)/u);
      return words.flatMap((word) => this.merge([...word])).flatMap((piece) => this.ids.get(piece) ?? spell(piece));
    });
  }

  // Join the two neighbours whose joined piece has the best score, the first of equals, until none can be joined.
  merge(parts) {
    for (;;) {
      let best = -1, bestScore = -Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const score = this.scores.get(parts[i] + parts[i + 1]);
        if (score > bestScore) (best = i), (bestScore = score);
      }
      if (best < 0) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }

  // The text of `tokens`; control symbols are silent.
  decode(tokens) {
    const encoder = new TextEncoder();
    const bytes = tokens.flatMap((token) => {
      if (this.byteOf.has(token)) return [this.byteOf.get(token)];
      return [...encoder.encode((this.vocabulary.pieces[token] ?? "").replaceAll(SPACE_MARK, " "))];
    });
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
  }

  norm(x, gain) {
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += x[i] * x[i];
    const scale = 1 / Math.sqrt(sum / x.length + this.config.norm_eps);
    for (let i = 0; i < x.length; i++) this.normed[i] = x[i] * scale * gain[i];
    return this.normed;
  }

  // Rotate the two halves of each head against each other, by angles that grow with the position.
  rotate(heads, position) {
    const half = this.config.d_head / 2;
    for (let i = 0; i < half; i++) {
      const cos = Math.cos(position * this.turns[i]), sin = Math.sin(position * this.turns[i]);
      for (let at = i; at < heads.length; at += 2 * half) {
        const first = heads[at], second = heads[at + half];
        heads[at] = first * cos - second * sin;
        heads[at + half] = second * cos + first * sin;
      }
    }
  }

  // Read `token` at `position`, behind what was read at 0 .. position - 1; logits (vocab_size) of what follows.
  step(token, position) {
    const { weights, config, x } = this;
    const embedding = weights["model.embed_tokens.weight"];
    x.set(embedding.values.subarray(token * x.length, (token + 1) * x.length));
    for (let layer = 0; layer < config.n_layers; layer++) {
      const part = (name) => weights[`model.layers.${layer}.${name}.weight`];
      this.attend(layer, position, this.norm(x, part("input_layernorm")), part);
      for (let i = 0; i < x.length; i++) x[i] += this.added[i];
      this.norm(x, part("post_attention_layernorm"));
      const gate = multiply(part("mlp.gate_proj"), this.normed, this.gate);
      const up = multiply(part("mlp.up_proj"), this.normed, this.up);
      for (let i = 0; i < gate.length; i++) gate[i] *= up[i] / (1 + Math.exp(-gate[i])); // SwiGLU
      multiply(part("mlp.down_proj"), gate, this.added);
      for (let i = 0; i < x.length; i++) x[i] += this.added[i];
    }
    return multiply(embedding, this.norm(x, weights["model.norm.weight"]), this.logits);
  }

  // What the attention of `layer` adds, into `this.added`; its weights over positions, into `this.attention[layer][head]`.
  attend(layer, position, input, part) {
    const { n_heads, n_kv_heads, d_head } = this.config;
    const width = n_kv_heads * d_head;
    const keys = this.keys[layer], values = this.values[layer], { q, mixed } = this;
    const key = keys.subarray(position * width, (position + 1) * width);
    multiply(part("self_attn.q_proj"), input, q);
    multiply(part("self_attn.k_proj"), input, key);
    multiply(part("self_attn.v_proj"), input, values.subarray(position * width, (position + 1) * width));
    this.rotate(q, position);
    this.rotate(key, position);
    mixed.fill(0);
    for (let head = 0; head < n_heads; head++) {
      const shared = Math.floor((head * n_kv_heads) / n_heads) * d_head; // query heads share a key/value head
      const look = this.attention[layer][head];
      for (let t = 0; t <= position; t++) {
        let sum = 0;
        for (let i = 0; i < d_head; i++) sum += q[head * d_head + i] * keys[t * width + shared + i];
        look[t] = sum / Math.sqrt(d_head);
      }
      softmax(look, position + 1);
      if (this.off.has(`${layer}.${head}`)) continue;
      for (let t = 0; t <= position; t++)
        for (let i = 0; i < d_head; i++) mixed[head * d_head + i] += look[t] * values[t * width + shared + i];
    }
    multiply(part("self_attn.o_proj"), mixed, this.added);
  }
}

if (typeof module !== "undefined") module.exports = { Model, choose, likeliest, probabilities, random };
