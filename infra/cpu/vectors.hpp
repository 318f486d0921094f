// Vector arithmetic for the C++ kernels. A vector has 16 numbers on every machine, so that sums have the same order
// everywhere. It consists of parts as wide as the machine's registers, because a compiler splits comparisons of wider
// vectors into comparisons of single numbers.

#pragma once

#include <cstdint>
#include <cstring>

// Functions are inlined because a call would pass vectors through memory.
#define ALWAYS_INLINE __attribute__((always_inline))

namespace {

#if defined(VECTOR_WIDTH)  // tests build every width
constexpr int WIDTH = VECTOR_WIDTH;
#elif defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int LANES = 16, PARTS = LANES / WIDTH;

template <class T>
struct Vector {
    typedef T Number;
    typedef T Part __attribute__((vector_size(WIDTH * sizeof(T))));
    Part parts[PARTS];

    T operator[](int lane) const { return parts[lane / WIDTH][lane % WIDTH]; }
    void set(int lane, T value) { parts[lane / WIDTH][lane % WIDTH] = value; }

    // Copies part by part: a copy of the whole vector would pass through memory in pieces smaller than a part.
    static ALWAYS_INLINE Vector load(const T* p) {
        Vector v;
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) std::memcpy(&v.parts[part], p + part * WIDTH, sizeof(Part));
        return v;
    }
    ALWAYS_INLINE void store(T* p) const {
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) std::memcpy(p + part * WIDTH, &parts[part], sizeof(Part));
    }
};

typedef Vector<float> Floats;
typedef Vector<int32_t> Ints;
typedef Vector<uint32_t> Words;
typedef Vector<uint16_t> Halves;

// Returns a vector whose part number i is work(i).
template <class V, class Work>
inline ALWAYS_INLINE V by_parts(Work work) {
    V v;
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) v.parts[part] = work(part);
    return v;
}

#define VECTOR_OPERATOR(op)                                                                             \
    template <class T>                                                                                  \
    inline ALWAYS_INLINE Vector<T> operator op(Vector<T> a, Vector<T> b) {                              \
        return by_parts<Vector<T>>([&](int i) ALWAYS_INLINE { return a.parts[i] op b.parts[i]; });      \
    }                                                                                                   \
    template <class T>                                                                                  \
    inline ALWAYS_INLINE Vector<T> operator op(Vector<T> a, typename Vector<T>::Number b) {             \
        return by_parts<Vector<T>>([&](int i) ALWAYS_INLINE { return a.parts[i] op b; });               \
    }                                                                                                   \
    template <class T>                                                                                  \
    inline ALWAYS_INLINE Vector<T> operator op(typename Vector<T>::Number a, Vector<T> b) {             \
        return by_parts<Vector<T>>([&](int i) ALWAYS_INLINE { return a op b.parts[i]; });               \
    }                                                                                                   \
    template <class T, class Other>                                                                     \
    inline ALWAYS_INLINE Vector<T>& operator op##=(Vector<T>& a, Other b) {                             \
        return a = a op b;                                                                              \
    }
VECTOR_OPERATOR(+)
VECTOR_OPERATOR(-)
VECTOR_OPERATOR(*)
VECTOR_OPERATOR(&)
VECTOR_OPERATOR(|)
VECTOR_OPERATOR(^)
VECTOR_OPERATOR(<<)
VECTOR_OPERATOR(>>)
#undef VECTOR_OPERATOR

// Reinterprets the bits of each number as another type.
template <class To, class From>
inline ALWAYS_INLINE To bits_of(From v) {
    return by_parts<To>([&](int i) ALWAYS_INLINE { return (typename To::Part)v.parts[i]; });
}

template <class To, class From>
inline ALWAYS_INLINE To converted(From v) {
    return by_parts<To>([&](int i) ALWAYS_INLINE { return __builtin_convertvector(v.parts[i], typename To::Part); });
}

// Returns a > b ? a : b for each number, which is b if one of them is NaN.
inline ALWAYS_INLINE Floats larger(Floats a, Floats b) {
    return by_parts<Floats>([&](int i) ALWAYS_INLINE { return a.parts[i] > b.parts[i] ? a.parts[i] : b.parts[i]; });
}

struct Float32 {
    typedef float Stored;
    static float widen(float x) { return x; }
    static ALWAYS_INLINE Floats load(const float* p) { return Floats::load(p); }
    static ALWAYS_INLINE void store(float* p, Floats v) { v.store(p); }
};

struct Bfloat16 {
    typedef uint16_t Stored;
    static float widen(uint16_t x) {
        uint32_t bits = uint32_t(x) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    static ALWAYS_INLINE Floats load(const uint16_t* p) { return bits_of<Floats>(converted<Words>(Halves::load(p)) << 16); }
    static ALWAYS_INLINE void store(uint16_t* p, Floats v) {  // rounds to nearest, ties to even; NaN stays NaN
        const Words bits = bits_of<Words>(v);
        const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
        converted<Halves>(by_parts<Words>([&](int i) ALWAYS_INLINE {
            return v.parts[i] == v.parts[i] ? rounded.parts[i] : nan.parts[i];
        })).store(p);
    }
};

// Returns 2 ** y by the Taylor polynomial on [-1/2, 1/2]: relative error below 2e-8 before rounding; NaN stays NaN.
inline ALWAYS_INLINE Floats exp2_of(Floats y) {
    const float shift = 12582912.0f + 127.0f;  // rounds y; the low bits hold its exponent field
    y = larger(Floats{} - 126.0f, y);
    Floats rounded = y + shift;
    Floats r = y - (rounded - shift);
    Floats p = Floats{} + 1.5403530393381609e-4f;
    p = p * r + 1.3333558146428443e-3f;
    p = p * r + 9.6181291076284771e-3f;
    p = p * r + 5.5504108664821579e-2f;
    p = p * r + 2.4022650695910071e-1f;
    p = p * r + 6.9314718055994530e-1f;
    p = p * r + 1.0f;
    return p * bits_of<Floats>(bits_of<Ints>(rounded) << 23);
}

}  // namespace
