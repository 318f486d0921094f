// Dropout on a CPU; cpu_dropout.py builds, loads and calls this library.
//
// Whether an element is dropped depends only on the seed and the element's index. So the backward pass draws the
// same mask as the forward pass, with any number of threads. Each block of BLOCK elements has its own generator: 16
// parallel xorshift128 generators (Marsaglia, "Xorshift RNGs", 2003), seeded by splitmix64 (Steele et al., "Fast
// splittable pseudorandom number generators", 2014). Each 32-bit random number decides on two elements.

#include <algorithm>

#include "vectors.hpp"

namespace {

constexpr int64_t BLOCK = 4096;

uint64_t splitmix64(uint64_t& state) {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

struct Generator {
    Words state[4];

    Generator(uint64_t seed, uint64_t block) {
        uint64_t mixer = seed;
        mixer = splitmix64(mixer) + block;
        uint64_t words[2 * LANES];
        for (auto& word : words) word = splitmix64(mixer);
        std::memcpy(state, words, sizeof state);
    }

    ALWAYS_INLINE Words next() {
        Words t = state[0] ^ (state[0] << 11);
        state[0] = state[1];
        state[1] = state[2];
        state[2] = state[3];
        state[3] ^= (state[3] >> 19) ^ t ^ (t >> 8);
        return state[3];
    }
};

// Writes min(count, LANES) elements of y: x * scale if the element's random number is at least `threshold`, else 0.
template <class Kind>
void drop_lanes(const typename Kind::Stored* x, typename Kind::Stored* y, Words random, Words threshold, float scale,
                int64_t count) {
    auto kept = [&](Floats v) ALWAYS_INLINE {
        v *= scale;
        return by_parts<Floats>([&](int i) ALWAYS_INLINE {
            return random.parts[i] >= threshold.parts[i] ? v.parts[i] : Floats::Part{};
        });
    };
    if (count >= LANES) {
        Kind::store(y, kept(Kind::load(x)));
        return;
    }
    typename Kind::Stored part[LANES] = {};
    std::memcpy(part, x, count * sizeof *x);
    Kind::store(part, kept(Kind::load(part)));
    std::memcpy(y, part, count * sizeof *x);
}

template <class Kind>
void dropout(const void* x, void* y, int64_t first, int64_t count, uint64_t seed, uint32_t dropped, float scale) {
    typedef typename Kind::Stored Stored;
    const Words threshold = Words{} + dropped;
    for (int64_t block = first; block * BLOCK < count; ++block) {
        Generator generator(seed, uint64_t(block));
        const int64_t end = std::min(count, (block + 1) * BLOCK);
        for (int64_t n = block * BLOCK; n < end; n += 2 * LANES) {
            const Words bits = generator.next();
            auto from = static_cast<const Stored*>(x) + n;
            auto to = static_cast<Stored*>(y) + n;
            drop_lanes<Kind>(from, to, bits & 0xffff, threshold, scale, end - n);
            if (n + LANES < end)
                drop_lanes<Kind>(from + LANES, to + LANES, bits >> 16, threshold, scale, end - n - LANES);
        }
    }
}

}  // namespace

// Sets y to x * scale, or to 0 with probability dropped / 2 ** 16, from the start of block `first` to element `count`.
extern "C" void dropout_float32(const void* x, void* y, int64_t first, int64_t count, uint64_t seed,
                                uint32_t dropped, float scale) {
    dropout<Float32>(x, y, first, count, seed, dropped, scale);
}

extern "C" void dropout_bfloat16(const void* x, void* y, int64_t first, int64_t count, uint64_t seed,
                                 uint32_t dropped, float scale) {
    dropout<Bfloat16>(x, y, first, count, seed, dropped, scale);
}

extern "C" int64_t dropout_block() { return BLOCK; }
