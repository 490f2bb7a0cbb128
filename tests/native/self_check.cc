// Holds the native library against plain loops, without Python: for sanitizers and for other
// processors under an emulator. Prints what it did; exit status 0 where everything agreed.
//
//   self_check [fork]
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "bitnet.h"

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

// A random problem, its memory of the exact size so that a sanitizer sees a step outside.
struct Example {
  kbn_matmul problem{};
  std::vector<uint8_t> codes, tiles;
  std::vector<float> x, y, scale, bias;
  std::vector<int8_t> x_codes;

  Example(int64_t m, int64_t k, int64_t n, int bits, float offset, int64_t group, uint32_t seed,
          bool trits = false) {
    std::mt19937 random(seed);
    const int64_t inputs = trits ? 20 : 32 / bits, tiles_in = ceil_div(k, inputs);
    codes.resize(k * n);
    tiles.resize(ceil_div(n, 16) * tiles_in * 64);
    for (int64_t row = 0; row < k; ++row) {
      for (int64_t column = 0; column < n; ++column) {
        const uint8_t code = random() % (trits ? 3 : 1 << bits);
        codes[row * n + column] = code;
        const int64_t tile = column / 16 * tiles_in + row / inputs;
        const int64_t i = row % inputs / 4, j = row % 4;
        uint8_t& byte = tiles[tile * 64 + column % 16 * 4 + j];
        const int places[] = {81, 27, 9, 3, 1};
        byte = uint8_t(trits ? byte + code * places[i] : byte | code << (bits * i));
      }
    }
    if (trits) {
      for (uint8_t& byte : tiles) byte = uint8_t(byte * 256 / 243 + 1);
    }
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < m * k; ++i) x.push_back(uniform(random));
    for (int64_t i = 0; i < m * k; ++i) x_codes.push_back(int8_t(random()));
    for (int64_t i = 0; i < (group ? ceil_div(k, group) : 1) * n; ++i) scale.push_back(0.5f);
    for (int64_t i = 0; i < n; ++i) bias.push_back(uniform(random));
    y.assign(m * n, std::numeric_limits<float>::quiet_NaN());
    problem.rows = m, problem.in_features = k, problem.out_features = n;
    problem.group_size = group, problem.bits = bits, problem.offset = offset;
    problem.layout = trits ? KBN_TRITS : KBN_TILES;
    problem.activation_bits = 8, problem.epsilon = 1e-5f, problem.scale_columns = int32_t(n);
    problem.x = x.data(), problem.tiles = tiles.data(), problem.scale = scale.data();
    problem.bias = bias.data(), problem.y = y.data();
  }

  std::string name() const {
    std::ostringstream out;
    out << kbn_isa() << " m=" << problem.rows << " k=" << problem.in_features
        << " n=" << problem.out_features << " bits=" << problem.bits
        << " offset=" << problem.offset << " group=" << problem.group_size
        << " layout=" << problem.layout;
    return out.str();
  }

  // sum_k step * (code + offset) * x_code, (m, groups, n)
  std::vector<int64_t> sums(const std::vector<int8_t>& x_codes) const {
    const int64_t m = problem.rows, k = problem.in_features, n = problem.out_features;
    const int64_t size = problem.group_size ? problem.group_size : k, groups = ceil_div(k, size);
    const int step = std::floor(problem.offset) == problem.offset ? 1 : 2;
    std::vector<int64_t> sums(m * groups * n);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t column = 0; column < n; ++column) {
          const int64_t weight = step * codes[i * n + column] + int64_t(step * problem.offset);
          sums[(row * groups + i / size) * n + column] += weight * x_codes[row * k + i];
        }
      }
    }
    return sums;
  }
};

void check_sums(const Example& example) {
  const std::vector<int64_t> expected = example.sums(example.x_codes);
  std::vector<int32_t> got(expected.size(), -1);
  const int code = kbn_accumulate(&example.problem, example.x_codes.data(), got.data());
  require(code == 0, example.name() + ": " + kbn_error(code));
  for (size_t i = 0; i < got.size(); ++i) {
    require(got[i] == expected[i], "sums of " + example.name());
  }
}

void check_output(Example& example) {
  const int64_t m = example.problem.rows, k = example.problem.in_features;
  const int64_t n = example.problem.out_features;
  std::vector<int8_t> codes(m * k);
  std::vector<float> scales(m);
  int code = kbn_quantize(&example.problem, codes.data(), scales.data());
  require(code == 0, example.name() + ": " + kbn_error(code));
  for (int64_t row = 0; row < m; ++row) {
    float absmax = 0;
    for (int64_t i = 0; i < k; ++i) absmax = std::fmax(absmax, std::fabs(example.x[row * k + i]));
    absmax = std::fmax(absmax, 1e-5f);
    const float inverse = 127.0f / absmax;
    require(scales[row] == absmax * (1.0f / 127.0f), "scales of " + example.name());
    for (int64_t i = 0; i < k; ++i) {
      const float ratio = std::nearbyint(example.x[row * k + i] * inverse);
      require(codes[row * k + i] == int8_t(ratio), "codes of " + example.name());
    }
  }
  code = kbn_run(&example.problem, nullptr);
  require(code == 0, example.name() + ": " + kbn_error(code));
  const std::vector<int64_t> sums = example.sums(codes);
  const int64_t groups = int64_t(sums.size()) / (m * n);
  const int step = std::floor(example.problem.offset) == example.problem.offset ? 1 : 2;
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      int64_t sum = 0;
      for (int64_t group = 0; group < groups; ++group) {
        sum += sums[(row * groups + group) * n + column];
      }
      const double y = double(sum) * 0.5 / step * scales[row] + example.bias[column];
      const double error = std::fabs(y - example.y[row * n + column]);
      require(error <= 1e-4 * (1 + std::fabs(y)), "output of " + example.name());
    }
  }
}

// Activations that stay float.
void check_float_output(const Example& example) {
  kbn_matmul problem = example.problem;
  const int64_t k = problem.in_features, n = problem.out_features;
  std::vector<float> y(problem.rows * n);
  problem.activation_bits = 0, problem.y = y.data();
  require(kbn_run(&problem, nullptr) == 0, example.name() + ": " + kbn_error(1));
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      double wanted = example.bias[column], terms = std::fabs(wanted);
      for (int64_t i = 0; i < k; ++i) {
        const double weight = 0.5 * (example.codes[i * n + column] + double(problem.offset));
        wanted += weight * example.x[row * k + i];
        terms += std::fabs(weight);  // |x| is at most 1
      }
      require(std::fabs(y[row * n + column] - wanted) <= 1e-6 * terms,
              "float output of " + example.name());
    }
  }
}

// Attention of the last tokens to a cache of float32 or int8, with rotary tables and a mask or without.
void check_attention(int64_t groups, int64_t dim, int64_t tokens, int64_t now, bool int8, bool all,
                     uint32_t seed) {
  const int64_t batch = 2, heads = 2, rows = batch * heads;
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const auto numbers = [&](int64_t count) {
    std::vector<float> v(count);
    for (float& x : v) x = uniform(random);
    return v;
  };
  auto query = numbers(now * rows * groups * dim), key = numbers(now * rows * dim), y = query;
  auto value = numbers(now * rows * dim), cosines = numbers(now * dim), sines = numbers(now * dim);
  auto keys = numbers(rows * tokens * dim), values = numbers(rows * tokens * dim);
  std::vector<int8_t> key_codes(keys.size()), value_codes(values.size());
  for (int8_t& code : key_codes) code = int8_t(random() % 255 - 127);
  for (int8_t& code : value_codes) code = int8_t(random() % 255 - 127);
  auto key_scale = numbers(rows * tokens), value_scale = numbers(rows * tokens);
  for (float& scale : key_scale) scale *= 0.01f;
  for (float& scale : value_scale) scale *= 0.01f;
  std::vector<uint8_t> mask(now * tokens);
  for (uint8_t& seen : mask) seen = random() % 3 != 0;
  for (int64_t i = 0; i < now; ++i) mask[i * tokens + tokens - now + i] = 1;
  const int32_t index = int32_t(tokens - now);
  kbn_attention problem{};
  problem.batch = batch, problem.tokens = now, problem.length = tokens, problem.heads = heads * groups;
  problem.key_heads = heads, problem.head_dim = dim, problem.tables = problem.masks = 1;
  problem.cache_dtype = int8 ? KBN_I8 : KBN_F32, problem.scale = 0.7f, problem.index = &index;
  problem.query = query.data(), problem.key = key.data(), problem.value = value.data();
  if (all) problem.cosines = cosines.data(), problem.sines = sines.data();
  if (all) problem.mask = mask.data();
  problem.key_cache = int8 ? static_cast<void*>(key_codes.data()) : keys.data();
  problem.value_cache = int8 ? static_cast<void*>(value_codes.data()) : values.data();
  if (int8) problem.key_scale = key_scale.data(), problem.value_scale = value_scale.data();
  problem.y = y.data();
  require(kbn_attend(&problem, nullptr) == 0, std::string("attend: ") + kbn_error(1));

  // Numbers of a new token: of head `head` of so many in a sequence.
  const auto row_of = [&](const std::vector<float>& x, int64_t head, int64_t of, int64_t token) {
    return x.data() + ((head / of * now + token) * of + head % of) * dim;
  };
  const auto turned = [&](const float* row, int64_t token, int64_t i) -> double {
    if (!all) return row[i];
    const double other = i < dim / 2 ? -row[i + dim / 2] : row[i - dim / 2];
    return double(row[i]) * cosines[token * dim + i] + other * sines[token * dim + i];
  };
  const auto cached = [&](bool is_key, int64_t head, int64_t t, int64_t i) -> double {
    const int64_t row = head * tokens + t;
    if (!int8) return (is_key ? keys : values)[row * dim + i];
    return (is_key ? key_scale : value_scale)[row] *
           double((is_key ? key_codes : value_codes)[row * dim + i]);
  };
  for (int64_t head = 0; head < rows; ++head) {
    for (int64_t token = 0; token < now; ++token) {
      const float *new_key = row_of(key, head, heads, token), *new_value = row_of(value, head, heads, token);
      for (int64_t i = 0; i < dim; ++i) {
        const double step = int8 ? 0.51 / 127 * 2 : 1e-6;
        const double written = cached(true, head, index + token, i), row = cached(false, head, index + token, i);
        require(std::fabs(written - turned(new_key, token, i)) <= step, "key in the cache");
        require(std::fabs(row - new_value[i]) <= step, "value in the cache");
      }
    }
  }
  for (int64_t head = 0; head < rows * groups; ++head) {
    for (int64_t token = 0; token < now; ++token) {
      const float* own = row_of(query, head, heads * groups, token);
      std::vector<double> wanted(dim), weights(tokens);
      double sum = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        double score = 0;
        for (int64_t i = 0; i < dim; ++i) score += turned(own, token, i) * cached(true, head / groups, t, i);
        const bool seen = all ? mask[token * tokens + t] : t <= index + token;
        weights[t] = seen ? std::exp(score * 0.7f) : 0;
        sum += weights[t];
      }
      for (int64_t i = 0; i < dim; ++i) {
        for (int64_t t = 0; t < tokens; ++t) wanted[i] += weights[t] / sum * cached(false, head / groups, t, i);
        const double got = row_of(y, head, heads * groups, token)[i];
        require(std::fabs(got - wanted[i]) < 1e-3 * (1 + std::fabs(wanted[i])), "attention");
      }
    }
  }
}

void check_norm(int64_t rows, int64_t features, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-3, 3);
  std::vector<float> x(rows * features), scale(features), y(rows * features);
  for (float& value : x) value = uniform(random);
  for (float& value : scale) value = uniform(random);
  kbn_norm problem{rows, features, KBN_F32, 1e-5f, x.data(), scale.data(), y.data()};
  require(kbn_normalize(&problem, nullptr) == 0, std::string("normalize: ") + kbn_error(1));
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (int64_t i = 0; i < features; ++i) squares += double(x[row * features + i]) * x[row * features + i];
    const double factor = 1 / std::sqrt(squares / double(features) + 1e-5);
    for (int64_t i = 0; i < features; ++i) {
      const double wanted = x[row * features + i] * factor * scale[i];
      require(std::fabs(y[row * features + i] - wanted) < 1e-5, "norm");
    }
  }
}

// A norm within the product gives the bits of one before it.
void check_normalized_product(Example& example) {
  kbn_matmul& problem = example.problem;
  std::vector<float> gain(problem.in_features), normalized(example.x.size());
  for (size_t i = 0; i < gain.size(); ++i) gain[i] = 0.5f + float(i % 7);
  kbn_norm norm{problem.rows, problem.in_features, KBN_F32, 1e-5f, problem.x, gain.data(),
                normalized.data()};
  require(kbn_normalize(&norm, nullptr) == 0, std::string("normalize: ") + kbn_error(1));
  problem.gain = gain.data(), problem.norm_epsilon = 1e-5f;
  require(kbn_run(&problem, nullptr) == 0, example.name() + ": " + kbn_error(1));
  const std::vector<float> within = example.y;
  problem.gain = nullptr, problem.x = normalized.data();
  require(kbn_run(&problem, nullptr) == 0, example.name() + ": " + kbn_error(1));
  require(within == example.y, "norm within " + example.name());
}

// A block of a decoder gives the bits of its parts one after another.
void check_block(int64_t tokens, int activation, bool gated, bool normalized, uint32_t seed) {
  const int64_t sequences = 2, heads = 4, key_heads = 2, dim = 8, hidden = 40, inner = 100, length = 6;
  const int64_t batch = sequences * tokens;  // rows
  Example query(batch, hidden, heads * dim, 2, -1, 0, seed), key(batch, hidden, key_heads * dim, 2, -1, 0, seed + 1);
  Example value(batch, hidden, key_heads * dim, 2, -1, 0, seed + 2), up(batch, hidden, inner, 2, -1, 0, seed + 3);
  Example output(batch, heads * dim, hidden, 2, -1, 0, seed + 4), down(batch, inner, hidden, 2, -1, 0, seed + 5);
  Example gate(batch, hidden, inner, 2, -1, 0, seed + 6);
  const std::vector<float> gain(inner, 1.5f);
  for (Example* example : {&query, &key, &value, &output, &up, &down, &gate}) {
    example->problem.gain = normalized ? gain.data() : nullptr;
    example->problem.norm_epsilon = 1e-5f;
  }
  const auto multiply = [](Example& example, const std::vector<float>& x) {
    example.problem.x = x.data();
    require(kbn_run(&example.problem, nullptr) == 0, example.name() + ": " + kbn_error(1));
    return example.y;
  };
  const std::vector<float> x(query.x.begin(), query.x.begin() + batch * hidden);
  const std::vector<float> rows(sequences * key_heads * length * dim, 0.25f);
  const int32_t index = 3;
  kbn_attention attention{};
  attention.batch = sequences, attention.tokens = tokens, attention.length = length;
  attention.heads = heads, attention.key_heads = key_heads;
  attention.head_dim = dim, attention.tables = attention.masks = 1, attention.scale = 0.5f, attention.index = &index;
  std::vector<float> keys = rows, values = rows, attended(batch * heads * dim);
  attention.key_cache = keys.data(), attention.value_cache = values.data(), attention.y = attended.data();
  multiply(query, x), multiply(key, x), multiply(value, x);
  attention.query = query.y.data(), attention.key = key.y.data(), attention.value = value.y.data();
  require(kbn_attend(&attention, nullptr) == 0, std::string("attend: ") + kbn_error(1));
  std::vector<float> stream = multiply(output, attended);
  for (size_t i = 0; i < stream.size(); ++i) stream[i] = x[i] + stream[i];
  std::vector<float> middle = multiply(up, stream);
  const std::vector<float> gates = gated ? multiply(gate, stream) : middle;
  for (size_t i = 0; i < middle.size(); ++i) {
    const float g = gates[i], r = g > 0 ? g : 0;
    const double smooth = double(g) / (1 + std::exp(-double(g)));
    const float active = activation == KBN_RELU ? r : activation == KBN_RELU2 ? r * r : float(smooth);
    middle[i] = gated ? active * middle[i] : active;
  }
  std::vector<float> wanted = multiply(down, middle);
  for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = stream[i] + wanted[i];

  std::vector<float> new_keys = rows, new_values = rows, y(batch * hidden, NAN);
  kbn_attention of_block = attention;
  of_block.query = of_block.key = of_block.value = nullptr, of_block.y = nullptr;
  of_block.key_cache = new_keys.data(), of_block.value_cache = new_values.data();
  kbn_block block{&query.problem, &key.problem, &value.problem, &output.problem, &up.problem, &down.problem,
                  gated ? &gate.problem : nullptr, &of_block, activation, x.data(), y.data()};
  require(kbn_decode(&block, nullptr) == 0, std::string("block: ") + kbn_error(1));
  require(new_keys == keys && new_values == values, "cache of a block");
  double apart = 0, size = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    apart += std::pow(double(y[i]) - wanted[i], 2), size += std::pow(double(wanted[i]), 2);
  }
  // An exponential that is rounded otherwise may move a code.
  require(apart <= (activation == KBN_SILU ? 1e-4 * size : 0), "block");
  block.activation = 3;
  require(kbn_decode(&block, nullptr) != 0, "an unknown activation");
  block.activation = activation, down.problem.in_features = inner - 1;
  require(kbn_decode(&block, nullptr) != 0, "parts that do not fit");
}

// A joint product gives the bits of one after another.
void check_joint(int64_t m, int64_t k, int bits, float offset, int64_t group, uint32_t seed) {
  Example first(m, k, 33, bits, offset, group, seed), second(m, k, 100, bits, offset, group, seed + 1);
  second.problem.x = first.problem.x;
  for (Example* example : {&first, &second}) {
    require(kbn_run(&example->problem, nullptr) == 0, example->name() + ": " + kbn_error(1));
  }
  const std::vector<float> wanted[] = {first.y, second.y};
  std::fill(first.y.begin(), first.y.end(), NAN), std::fill(second.y.begin(), second.y.end(), NAN);
  const kbn_joint both{2, {&first.problem, &second.problem}};
  require(kbn_run_joint(&both, nullptr) == 0, first.name() + ": " + kbn_error(1));
  require(first.y == wanted[0] && second.y == wanted[1], "joint " + first.name());
  second.problem.epsilon = 2;
  require(kbn_run_joint(&both, nullptr) != 0, "joint matmuls that do not agree");
}

// Patches of images give the bits of the same patches as rows.
void check_window(int64_t size, int64_t stride, int64_t dilation, int64_t before, uint32_t seed) {
  const int64_t images = 2, length = 5, channels = 3, span = dilation * (size - 1) + 1;
  const int64_t positions = (length + 2 * before - span) / stride + 1;
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(images * length * length * channels);
  for (float& value : x) value = uniform(random);
  Example example(images * positions * positions, size * size * channels, 33, 2, -1, 0, seed);
  float* to = example.x.data();
  for (int64_t row = 0; row < example.problem.rows; ++row) {
    for (int64_t i = 0; i < size * size; ++i) {
      const int64_t image = row / (positions * positions);
      const int64_t at_0 = row / positions % positions * stride + i / size * dilation - before;
      const int64_t at_1 = row % positions * stride + i % size * dilation - before;
      const bool inside = at_0 >= 0 && at_0 < length && at_1 >= 0 && at_1 < length;
      for (int64_t c = 0; c < channels; ++c) {
        *to++ = inside ? x[((image * length + at_0) * length + at_1) * channels + c] : 0;
      }
    }
  }
  require(kbn_run(&example.problem, nullptr) == 0, example.name() + ": " + kbn_error(1));
  const std::vector<float> wanted = example.y;
  const kbn_window window{{1, length, length}, {1, positions, positions}, {1, size, size},
                          {1, stride, stride}, {1, dilation, dilation},   {0, before, before}};
  example.problem.window = &window, example.problem.x = x.data();
  require(kbn_run(&example.problem, nullptr) == 0, example.name() + ": " + kbn_error(1));
  require(wanted == example.y, "patches of " + example.name());
}

void check_isa() {
  const struct {
    int bits;
    float offset;
    bool trits;
  } widths[] = {{1, -0.5f, false}, {2, -1, false}, {2, -1.5f, false},
                {4, -8, false},    {8, -128, false}, {2, -1, true}};
  int count = 0;
  uint32_t seed = 0;
  for (const auto& width : widths) {
    for (int64_t group : {0, 32, 64, 96}) {
      if (width.trits && group) continue;
      for (int64_t m : {1, 2, 5, 13}) {
        for (int64_t k : {1, 33, 100, 257}) {
          for (int64_t n : {1, 47}) {
            Example example(m, k, n, width.bits, width.offset, group, ++seed,
                            width.trits);
            check_sums(example);
            check_output(example);
            check_float_output(example);
            check_normalized_product(example);
            ++count;
          }
        }
      }
    }
  }
  for (int64_t dim : {2, 20, 128}) {
    for (int64_t tokens : {1, 16, 77}) {
      for (int i = 0; i < 8; ++i, ++count) {
        const int64_t now = i < 4 ? 1 : (tokens + 1) / 2;
        check_attention(1 + i % 4, dim, tokens, now, i % 2, i / 2 % 2, ++seed);
      }
    }
  }
  for (int64_t size : {1, 2, 3}) {
    for (int64_t stride : {1, 2}) {
      for (int64_t dilation : {1, 2}) {
        for (int64_t before : {0, 1}) check_window(size, stride, dilation, before, ++seed), ++count;
      }
    }
  }
  for (int64_t features : {1, 15, 2560}) check_norm(40, features, ++seed), ++count;
  for (int activation : {KBN_RELU, KBN_RELU2, KBN_SILU}) {
    for (int i = 0; i < 4; ++i, ++count) check_block(1 + i % 3, activation, i % 2, i / 2, seed += 7);
  }
  for (int64_t m : {1, 2, 70}) {
    for (int64_t k : {100, 512}) {
      for (int64_t group : {0, 64}) {
        check_joint(m, k, 2, -1, group, seed += 2), check_joint(m, k, 8, -128, group, seed += 2);
        count += 2;
      }
    }
  }
  std::printf("%s: %d problems agree\n", kbn_isa(), count);
}

// Many callers at once, while the number of threads changes.
void check_threads() {
  Example shared(9, 512, 1024, 2, -1, 0, 1);
  require(kbn_run(&shared.problem, nullptr) == 0, "run");
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([&] {
      std::vector<float> y(shared.y.size());
      kbn_matmul problem = shared.problem;
      problem.y = y.data();
      for (int repeat = 0; repeat < 20; ++repeat) {
        if (kbn_run(&problem, nullptr) || y != shared.y) ++wrong;
      }
    });
  }
  for (int count : {1, 4, 2, 3, 8, 2}) {
    kbn_set_threads(count);
    std::this_thread::yield();
  }
  for (auto& caller : callers) caller.join();
  require(wrong == 0, "concurrent callers");
  std::printf("concurrent callers agree\n");
}

// Five trits a byte, of every number of inputs modulo 5 and 16, against the definition of both layouts.
void check_trits() {
  std::mt19937 random(5);
  const int64_t sizes[][2] = {{1, 1},  {4, 3},   {5, 16},  {15, 17}, {16, 32},
                              {33, 5}, {80, 40}, {97, 33}, {160, 7}, {254, 100}};
  for (const auto& size : sizes) {
    const int64_t k = size[0], n = size[1], tiles_in = ceil_div(k, 16);
    std::vector<uint8_t> packed(ceil_div(k, 5) * n);
    std::vector<uint8_t> tiles(ceil_div(n, 16) * tiles_in * 64, 0xff), wanted(tiles.size());
    for (int64_t i = ceil_div(k, 5) * 5 - 1; i >= 0; --i) {
      for (int64_t j = 0; j < n; ++j) {
        const int code = i < k ? static_cast<int>(random() % 3) : 1;  // files are padded with ones
        packed[i / 5 * n + j] = static_cast<uint8_t>(packed[i / 5 * n + j] * 3 + code);
        if (i >= k) continue;
        const int64_t tile = j / 16 * tiles_in + i / 16;
        wanted[(tile * 16 + j % 16) * 4 + i % 4] |= code << (i % 16 / 4 * 2);
      }
    }
    require(kbn_tiles_from_trits(packed.data(), k, n, tiles.data()) == 0, "trits");
    require(tiles == wanted, "tiles of trits");
    packed[packed.size() / 2] = 243;
    require(kbn_tiles_from_trits(packed.data(), k, n, tiles.data()) != 0, "a byte without trits");
  }
  std::printf("tiles of trits agree\n");
}

void check_fork() {
#if !defined(_WIN32)
  Example example(9, 512, 1024, 2, -1, 0, 2);
  require(kbn_run(&example.problem, nullptr) == 0, "run");
  const pid_t child = fork();
  if (child == 0) {
    const std::vector<float> expected = example.y;
    std::memset(example.y.data(), 0xff, example.y.size() * 4);
    _exit(kbn_run(&example.problem, nullptr) || example.y != expected);
  }
  int status = -1;
  waitpid(child, &status, 0);
  require(status == 0, "forked child");
  std::printf("forked child agrees\n");
#endif
}

}  // namespace

int main(int argc, char** argv) {
  std::stringstream isas(kbn_isas());
  for (std::string isa; std::getline(isas, isa, ',');) {
    require(kbn_set_isa(isa.c_str()) == 0, "set_isa " + isa);
    check_isa();
  }
  require(kbn_set_isa("no_such_isa") != 0, "an unknown instruction set must be refused");
  require(kbn_set_isa("auto") == 0, "set_isa auto");
  kbn_set_threads(3);
  check_threads();
  check_trits();
  if (argc > 1 && std::string(argv[1]) == "fork") check_fork();
}
