// minidiff's way from a prompt to a picture, in JavaScript: the tokenizer, the noise, the sampler.
// The three networks are ONNX graphs, which onnxruntime-web runs on one thread of the CPU.
// Names are those of the Python files: text.py, samplers.py, denoiser.py, guidance.py, steps.py.

// The parts of this page: gzip in base64, in <script> elements.

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const letters = atob(base64), bytes = new Uint8Array(letters.length);
  for (let k = 0; k < letters.length; k++) bytes[k] = letters.charCodeAt(k);
  return bytes;
}

async function part(id) {
  const zipped = new Blob([bytesOf(document.getElementById(id).textContent)]);
  const stream = zipped.stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const partAsText = async id => new TextDecoder().decode(await part(id));

// text.py: a prompt to tokens, by CLIP's byte pairs.

const START = 49406, END = 49407;
const PIECES = new RegExp(
  "<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}]+", "giu");

class Tokenizer {
  constructor(merges) {
    // Each byte has a letter: its own where that prints, else one from 256 on.
    const prints = byte => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    const bytes = [...Array(256).keys()];
    const order = [...bytes.filter(prints), ...bytes.filter(byte => !prints(byte))];
    this.letter = {};
    let next = 256;
    for (const byte of order) this.letter[byte] = String.fromCharCode(prints(byte) ? byte : next++);

    // The vocabulary: the letters, the letters that end a word, and what the merges make.
    const letters = order.map(byte => this.letter[byte]);
    const merged = merges.map(pair => pair.replace(" ", ""));
    const words = [...letters, ...letters.map(letter => letter + "</w>"), ...merged];
    this.ids = new Map(words.map((word, id) => [word, id]));
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank]));
  }

  // One word as tokens: merge the pair that comes first in the table, until no pair is in it.
  merge(word) {
    const bytes = new TextEncoder().encode(word);
    let pieces = [...bytes].map(byte => this.letter[byte]);
    pieces[pieces.length - 1] += "</w>";
    for (;;) {
      const rank = k => this.ranks.get(`${pieces[k]} ${pieces[k + 1]}`) ?? Infinity;
      let first = 0;
      for (let k = 1; k < pieces.length - 1; k++) if (rank(k) < rank(first)) first = k;
      if (pieces.length < 2 || rank(first) === Infinity) break;
      const [left, right] = [pieces[first], pieces[first + 1]], joined = [];
      for (let k = 0; k < pieces.length; k++) {
        const pair = pieces[k] === left && pieces[k + 1] === right;
        joined.push(pair ? left + right : pieces[k]);
        if (pair) k++;
      }
      pieces = joined;
    }
    return pieces.map(piece => this.ids.get(piece));
  }

  // The tokens of a prompt, without start and end.
  encode(prompt) {
    const text = prompt.replace(/<\|(start|end)oftext\|>/gi, "<$1_of_text>");
    const special = { "<start_of_text>": [START], "<end_of_text>": [END] };
    const words = clean(text).match(PIECES) ?? [];
    return words.flatMap(word => special[word] ?? this.merge(word));
  }

  // start, words, end, padding: one row of the text encoder's input. Words that do not fit are cut.
  row(prompt, { length, pad }) {
    const row = [START, ...this.encode(prompt).slice(0, length - 2), END];
    return [...row, ...Array(length - row.length).fill(pad)];
  }
}

// As open_clip: straight quotes, HTML's names of letters twice, one space, lower case. Of ftfy,
// which mends broken letters there, this is all.
function clean(text) {
  const area = document.createElement("textarea");
  const unescape = letters => {
    area.innerHTML = letters.replaceAll("<", "&lt;");
    return area.value;
  };
  const straight = text.normalize("NFC").replace(/[‘’‚‛]/g, "'").replace(/[“”„‟]/g, '"');
  return unescape(unescape(straight)).replace(/\s+/g, " ").trim().toLowerCase();
}

// samplers.py, Normal: torch's own standard normal numbers, from (seed, index 0).

class Normal {
  // Torch's generator on the CPU is the Mersenne twister MT19937 (Matsumoto, Nishimura 1998).
  constructor(seed) {
    const mixed = BigInt(seed) * 1000003n * 2654435761n;  // training/seeds.py, seed_of(seed, 0)
    this.state = new Uint32Array(624);
    this.state[0] = Number(BigInt.asUintN(32, mixed));
    for (let i = 1; i < 624; i++) {
      const last = this.state[i - 1];
      this.state[i] = Math.imul(1812433253, last ^ (last >>> 30)) + i;
    }
    this.place = 624;
  }

  bits() {
    const m = this.state;
    if (this.place === 624) {
      for (let k = 0; k < 624; k++) {
        const y = (m[k] & 0x80000000) | (m[(k + 1) % 624] & 0x7fffffff);
        m[k] = m[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.place = 0;
    }
    let y = m[this.place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  // Torch fills sixteen numbers at a time with eight pairs of Box and Muller's.
  numbers(count) {
    const x = Float32Array.from({ length: count }, () => (this.bits() & 0xffffff) / 2 ** 24);
    for (let k = 0; k < count; k++) {
      if (k % 16 >= 8) continue;
      const radius = Math.sqrt(-2 * Math.log(1 - x[k])), angle = 2 * Math.PI * x[k + 8];
      x[k] = radius * Math.cos(angle);
      x[k + 8] = radius * Math.sin(angle);
    }
    return x;
  }
}

// denoiser.py: a network's output F estimates a x0 + b eps, one row (a, b) for each target.

const TARGETS = {
  eps: (alpha, sigma) => [0, 1],
  x0: (alpha, sigma) => [1, 0],
  v: (alpha, sigma) => [-sigma, alpha],
};

// c[0] x[0] + c[1] x[1] + ..., number by number.
const sum = (c, x) => x[0].map((_, k) => c.reduce((total, scale, i) => total + scale * x[i][k], 0));

class Model {
  static async load() {
    const model = new Model();
    const source = new Blob([await part("javascript")], { type: "text/javascript" });
    const ort = await import(URL.createObjectURL(source));
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = (await part("wasm")).buffer;
    const options = { graphOptimizationLevel: "disabled" };  // it takes longer than it saves
    for (const name of ["text", "unet", "decoder"]) {
      model[name] = await ort.InferenceSession.create(await part(name), options);
    }
    model.Tensor = ort.Tensor;
    model.settings = JSON.parse(await partAsText("settings"));
    model.tokenizer = new Tokenizer((await partAsText("merges")).split("\n"));
    return model;
  }

  floats(data, shape) {
    return new this.Tensor("float32", Float32Array.from(data), shape);
  }

  // The contexts of prompts, one after the other.
  async encode(prompts) {
    const { tokens } = this.settings;
    const rows = prompts.flatMap(prompt => this.tokenizer.row(prompt, tokens)).map(BigInt);
    const shape = [prompts.length, tokens.length];
    const input = new this.Tensor("int64", BigInt64Array.from(rows), shape);
    return (await this.text.run({ tokens: input })).output;
  }

  alphaSigma(t) {
    const alpha_bar = this.settings.alpha_bar[t];
    return [Math.sqrt(alpha_bar), Math.sqrt(1 - alpha_bar)];
  }

  // (x0, eps) of x_t under a context; guided, with null and context as one batch.
  async denoise(x, t, context, guidance) {
    const shape = [2, ...this.settings.latents];
    const { output } = await this.unet.run({
      x: this.floats([...x, ...x], shape),
      t: this.floats([t - 1, t - 1], [2]),  // published networks count noise levels from 0
      context,
    });
    const [alpha, sigma] = this.alphaSigma(t);
    const [a, b] = TARGETS[this.settings.target](alpha, sigma), det = alpha * b - sigma * a;
    const solve = F => ({
      x0: sum([b / det, -sigma / det], [x, F]),
      eps: sum([alpha / det, -a / det], [F, x]),
    });
    const away = solve(output.data.subarray(0, x.length));
    const towards = solve(output.data.subarray(x.length));
    const guide = name => sum([1 - guidance, guidance], [away[name], towards[name]]);
    return { x0: guide("x0"), eps: guide("eps") };  // eq: cfg-6
  }

  // samplers.py and steps.py: from noise to latents. Yields each time and the guess of x0 there.
  async *sample({ prompt, seed, steps, guidance, sampler }) {
    const context = await this.encode(["", prompt]);
    const normal = new Normal(seed), count = this.settings.latents.reduce((a, b) => a * b);
    const times = this.settings.times[steps - 1], eta = sampler === "ddpm" ? 1 : 0;
    let x = normal.numbers(count);
    for (let k = 0; k < steps; k++) {
      const t = times[k], s = Math.max(times[k + 1], this.settings.final);
      const { x0, eps } = await this.denoise(x, t, context, guidance);
      const [alpha_t, sigma_t] = this.alphaSigma(t), [alpha_s, sigma_s] = this.alphaSigma(s);
      const removed = Math.max(sigma_t ** 2 - (alpha_t / alpha_s) ** 2 * sigma_s ** 2, 0);
      const up = eta * (sigma_s / sigma_t) * Math.sqrt(removed);  // new noise  eq: ddim-16
      const down = Math.sqrt(Math.max(sigma_s ** 2 - up ** 2, 0));  // predicted noise that stays
      x = sum([alpha_s, down], [x0, eps]);  // eq: ddim-12
      if (eta > 0) x = sum([1, up], [x, normal.numbers(count)]);
      yield { t, x0 };
    }
    yield { t: 0, x0: x };
  }

  // Latents to the pixels of an image, red, green, blue and opaque.
  async decode(latents) {
    const input = this.floats(latents, [1, ...this.settings.latents]);
    const { output } = await this.decoder.run({ latents: input });
    const [, , height, width] = output.dims, area = height * width;
    const image = new ImageData(width, height);
    for (let k = 0; k < area; k++) {
      for (let c = 0; c < 3; c++) {
        image.data[4 * k + c] = Math.round((output.data[c * area + k] + 1) * 127.5);  // is clamped
      }
      image.data[4 * k + 3] = 255;
    }
    return image;
  }

  // What the model does not read of a prompt: words that it never saw, where they are known, and
  // what comes after its last token.
  complaints(prompt) {
    const { words, tokens } = this.settings, room = tokens.length - 2;
    const asked = new Set(prompt.toLowerCase().match(/[\p{L}\p{N}_]+/gu));
    const unknown = [...asked].filter(word => words && !words.includes(word)).sort();
    const all = `All that it knows: ${words?.join(", ")}.`;
    return [
      unknown.length ? `The model does not know ${unknown.join(", ")}. ${all}` : "",
      this.tokenizer.encode(prompt).length > room
        ? `The prompt is too long: the model reads the first ${room} tokens.` : "",
    ].join(" ").trim();
  }
}
