// Number formats of the PTX ISA: conversion and rounding, bit for bit.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

inline u32 bits(f32 x) { return std::bit_cast<u32>(x); }
inline f32 from_bits(u32 x) { return std::bit_cast<f32>(x); }

constexpr u32 CANONICAL_NAN = 0x7fffffff;  // what arithmetic on f32 gives for NaN

// The nearest number of `digits` significant bits whose last bit is worth at least 2^lowest; ties to even.
inline f64 round_to_digits(f64 x, int digits, int lowest) {
  if (x == 0 || !std::isfinite(x)) return x;
  int last = std::max(std::ilogb(x) - digits + 1, lowest);
  return std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
}

// a + b rounded to odd: rounding it once more to fewer digits is as good as rounding the exact sum.
inline f64 add_to_odd(f64 a, f64 b) {
  f64 sum = a + b;
  if (!std::isfinite(sum)) return sum;
  f64 b_part = sum - a, rest = (a - (sum - b_part)) + (b - b_part);
  if (rest != 0 && !(std::bit_cast<u64>(sum) & 1))
    sum = std::nextafter(sum, rest > 0 ? std::numeric_limits<f64>::infinity() : -std::numeric_limits<f64>::infinity());
  return sum;
}

struct f16 {
  u16 pattern;
  static constexpr int digits = 11, lowest = -24;
  f16() = default;
  explicit f16(f32 x) {
    u32 sign = bits(x) >> 16 & 0x8000, magnitude = bits(x) & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      pattern = 0x7fff;
    } else if (magnitude >= 0x477ff000) {  // 65520 rounds to infinity
      pattern = sign | 0x7c00;
    } else if (magnitude < 0x38800000) {  // below 2^-14: 0.5 has the last bit of a subnormal, 2^-24
      pattern = sign | (bits(from_bits(magnitude) + 0.5f) - bits(0.5f));
    } else {
      magnitude += 0xfff + (magnitude >> 13 & 1);
      pattern = sign | (magnitude - 0x38000000) >> 13;
    }
  }
  static f16 of(u32 pattern) {
    f16 x;
    x.pattern = pattern;
    return x;
  }
  operator f32() const {
    u32 sign = u32(pattern & 0x8000) << 16, exponent = pattern >> 10 & 31, fraction = pattern & 0x3ff;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    return from_bits(sign | bits(fraction * 0x1p-24f));
  }
};

inline f16 toward_zero(f32 x) {
  f16 nearest(x);
  if (std::fabs(f32(nearest)) > std::fabs(x)) nearest.pattern--;
  return nearest;
}

struct bf16 {
  u16 pattern;
  static constexpr int digits = 8, lowest = -133;
  bf16() = default;
  explicit bf16(f32 x) {
    u32 b = bits(x);
    pattern = std::isnan(x) ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
  }
  static bf16 of(u32 pattern) {
    bf16 x;
    x.pattern = pattern;
    return x;
  }
  operator f32() const { return from_bits(u32(pattern) << 16); }
};

template <class T>
struct pair {
  T low, high;
};

inline f32 e4m3_to_f32(u8 v) {
  int exponent = v >> 3 & 15, fraction = v & 7;
  f32 magnitude = (v & 0x7f) == 0x7f ? NAN
                  : exponent         ? std::ldexp(1.0f + fraction / 8.0f, exponent - 7)
                                     : std::ldexp(fraction / 8.0f, -6);
  return v & 0x80 ? -magnitude : magnitude;
}
inline f32 e5m2_to_f32(u8 v) { return f16::of(v << 8); }

// To nearest even; beyond the largest finite number that number (satfinite), NaN stays NaN.
inline u8 f32_to_e4m3(f32 x) {
  if (std::isnan(x)) return 0x7f;
  u8 sign = std::signbit(x) ? 0x80 : 0;
  f32 a = std::min<f32>(round_to_digits(std::min(std::fabs(x), 1e6f), 4, -9), 448);
  if (a < 0x1p-6f) return sign | u8(a * 512);
  int exponent = std::ilogb(a);
  return sign | u8((exponent + 7) << 3 | (int(std::ldexp(a, 3 - exponent)) & 7));
}
inline u8 f32_to_e5m2(f32 x) {
  if (std::isnan(x)) return 0x7f;
  f32 a = std::min<f32>(round_to_digits(std::min(std::fabs(x), 1e6f), 3, -16), 57344);
  return (std::signbit(x) ? 0x80 : 0) | f16(a).pattern >> 8;
}

inline f32 flush(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// min and max: the other operand where one is NaN; -0 is less than +0.
template <class T>
T lesser(T a, T b, T nan) {
  if (std::isnan(a)) return std::isnan(b) ? nan : b;
  if (std::isnan(b)) return a;
  return a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T greater(T a, T b, T nan) {
  if (std::isnan(a)) return std::isnan(b) ? nan : b;
  if (std::isnan(b)) return a;
  return a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
inline f32 minimum(f32 a, f32 b) { return lesser(a, b, from_bits(CANONICAL_NAN)); }
inline f32 maximum(f32 a, f32 b) { return greater(a, b, from_bits(CANONICAL_NAN)); }
inline f64 minimum(f64 a, f64 b) { return lesser(a, b, std::bit_cast<f64>(0x7fffffffffffffffull)); }
inline f64 maximum(f64 a, f64 b) { return greater(a, b, std::bit_cast<f64>(0x7fffffffffffffffull)); }
// .NaN: NaN where one is.
inline f32 minimum_nan(f32 a, f32 b) {
  return std::isnan(a) || std::isnan(b) ? from_bits(CANONICAL_NAN) : minimum(a, b);
}
inline f32 maximum_nan(f32 a, f32 b) {
  return std::isnan(a) || std::isnan(b) ? from_bits(CANONICAL_NAN) : maximum(a, b);
}
inline f32 with_sign_of_product(f32 x, f32 a, f32 b) {
  return std::isnan(x) ? x : std::signbit(a) != std::signbit(b) ? -x : x;
}
inline f32 canonical(f32 x) { return std::isnan(x) ? from_bits(CANONICAL_NAN) : x; }
inline f32 flush_canonical(f32 x) { return canonical(flush(x)); }

// Float to integer: NaN is 0, of or from 64 bits the highest bit alone; what does not fit is the nearest that does.
template <class I, class F>
I to_integer(F x) {
  if (std::isnan(x)) return sizeof(I) == 8 || sizeof(F) == 8 ? I(1ull << (8 * sizeof(I) - 1)) : 0;
  if (x >= std::ldexp(1.0, std::numeric_limits<I>::digits)) return std::numeric_limits<I>::max();
  if (x <= f64(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
  return I(x);
}

// One rounding of a * b + c, for the formats of 16 bits. The product of two of them is exact in f64.
template <class T>
T fma_once(T a, T b, T c) {
  return T(f32(round_to_digits(add_to_odd(f64(f32(a)) * f64(f32(b)), f64(f32(c))), T::digits, T::lowest)));
}
