// Instructions that compute each lane by itself. What one does is said here once, under its section of the PTX ISA: by
// title, since numbers differ between versions. A row: the spellings of the opcode, then the function of its operands.
//
// Approximate functions (ex2.approx, rsqrt.approx, div.full, ...) give the correctly rounded or the C library's value:
// hardware may be off by the bounds that the ISA states.
#pragma once
#include "machine.h"

namespace arithmetic {

template <class T> T load(Warp& w, int operand, int lane) {
  if constexpr (std::is_same_v<T, bool>) {
    return w.predicates[operand] >> lane & 1;
  } else {
    const u32* row = w.row(operand);
    if constexpr (sizeof(T) == 8) return std::bit_cast<T>(u64(row[lane]) | u64(row[LANES + lane]) << 32);
    else if constexpr (sizeof(T) == 4) return std::bit_cast<T>(row[lane]);
    else return std::bit_cast<T>(u16(row[lane]));
  }
}

template <class T> void store(Warp& w, int operand, int lane, T value) {
  if constexpr (std::is_same_v<T, bool>) {
    u32 bit = 1u << lane;
    w.predicates[operand] = (w.predicates[operand] & ~bit) | (value ? bit : 0);
  } else {
    u32* row = w.row(operand);
    if constexpr (sizeof(T) == 8) {
      u64 pattern = std::bit_cast<u64>(value);
      row[lane] = u32(pattern), row[LANES + lane] = u32(pattern >> 32);
    } else if constexpr (sizeof(T) == 4) row[lane] = std::bit_cast<u32>(value);
    else row[lane] = std::bit_cast<u16>(value);
  }
}

// An f32 that is flushed when it is read.
struct f32_ftz {
  u32 pattern;
  operator f32() const { return flush(from_bits(pattern)); }
};

template <class T> constexpr char letter = std::is_same_v<T, bool> ? 'p' : sizeof(T) == 8 ? 'd' : sizeof(T) == 4 ? 'r' : 'h';

template <class Function, class Signature> struct Lanes;
template <class Function, class Result, class... Operand> struct Lanes<Function, Result (*)(Operand...)> {
  static constexpr char signature[] = {letter<Result>, letter<Operand>..., 0};

  template <size_t... i>
  static void run(Warp& w, const s32* operands, u32 mask, std::index_sequence<i...>) {
    Result results[LANES];
    for (int lane = 0; lane < LANES; lane++) results[lane] = Function{}(load<Operand>(w, operands[1 + i], lane)...);
    for (int lane = 0; lane < LANES; lane++)
      if (mask >> lane & 1) store<Result>(w, operands[0], lane, results[lane]);
  }
  static void handle(Machine& m, Warp& w, const Instruction& in, u32 mask) {
    run(w, m.launch.pool + in.first, mask, std::index_sequence_for<Operand...>{});
  }
};

template <class Function> Entry each_lane(const char* spellings, Moves moves, Function function) {
  using L = Lanes<Function, decltype(+function)>;
  return {spellings, L::signature, L::handle, moves};
}

// A comparison's two forms: false, or (u) true, where an operand is NaN.
template <class T> bool unordered(T a, T b) {
  if constexpr (std::is_integral_v<T>) return false;
  else return std::isnan(f64(a)) || std::isnan(f64(b));
}

#define OP(spellings, result, operands, ...) each_lane(spellings, NOTHING, [] operands -> result { __VA_ARGS__ })
#define MOVE(moves, spellings, result, operands, ...) each_lane(spellings, moves, [] operands -> result { __VA_ARGS__ })
#define COMPARE(type, names_lt, names_le, names_gt, names_ge, names_eq, names_ne)            \
  OP(names_lt, bool, (type a, type b), return a < b;),                                    \
  OP(names_le, bool, (type a, type b), return a <= b;),                                   \
  OP(names_gt, bool, (type a, type b), return a > b;),                                    \
  OP(names_ge, bool, (type a, type b), return a >= b;),                                   \
  OP(names_eq, bool, (type a, type b), return a == b;),                                   \
  OP(names_ne, bool, (type a, type b), return !(a == b) && !unordered(a, b);)
#define COMPARE_INTEGER(type, name)                                                          \
  COMPARE(type, "setp.lt." name, "setp.le." name, "setp.gt." name, "setp.ge." name, "setp.eq." name, "setp.ne." name)
#define COMPARE_FLOAT(type, name)                                                            \
  COMPARE_INTEGER(type, name),                                                               \
  OP("setp.ltu." name, bool, (type a, type b), return a < b || unordered(a, b);),         \
  OP("setp.leu." name, bool, (type a, type b), return a <= b || unordered(a, b);),        \
  OP("setp.gtu." name, bool, (type a, type b), return a > b || unordered(a, b);),         \
  OP("setp.geu." name, bool, (type a, type b), return a >= b || unordered(a, b);),        \
  OP("setp.equ." name, bool, (type a, type b), return a == b || unordered(a, b);),        \
  OP("setp.neu." name, bool, (type a, type b), return !(a == b);),                        \
  OP("setp.num." name, bool, (type a, type b), return !unordered(a, b);),                 \
  OP("setp.nan." name, bool, (type a, type b), return unordered(a, b);)
// Arithmetic of a format of 16 bits: f32 has enough digits that rounding its result once more changes nothing.
#define HALF(type, name)                                                                                              \
  OP("add." name " add.rn." name, type, (type a, type b), return type(f32(a) + f32(b));),                          \
  OP("sub." name " sub.rn." name, type, (type a, type b), return type(f32(a) - f32(b));),                          \
  OP("mul." name " mul.rn." name, type, (type a, type b), return type(f32(a) * f32(b));),                          \
  OP("fma.rn." name, type, (type a, type b, type c), return fma_once(a, b, c);),                                   \
  OP("min." name, type, (type a, type b), return type(minimum(a, b));),                                            \
  OP("max." name, type, (type a, type b), return type(maximum(a, b));),                                            \
  OP("min.NaN." name, type, (type a, type b), return type(minimum_nan(a, b));),                                    \
  OP("max.NaN." name, type, (type a, type b), return type(maximum_nan(a, b));),                                    \
  OP("min.NaN." name "x2", pair<type>, (pair<type> a, pair<type> b),                                               \
        return {type(minimum_nan(a.low, b.low)), type(minimum_nan(a.high, b.high))};),                                \
  OP("max.NaN." name "x2", pair<type>, (pair<type> a, pair<type> b),                                               \
        return {type(maximum_nan(a.low, b.low)), type(maximum_nan(a.high, b.high))};),                                \
  OP("abs." name "x2", pair<type>, (pair<type> a),                                                                 \
        return {type::of(a.low.pattern & 0x7fff), type::of(a.high.pattern & 0x7fff)};),                               \
  OP("neg." name, type, (type a), return type::of(a.pattern ^ 0x8000);),                                           \
  OP("abs." name, type, (type a), return type::of(a.pattern & 0x7fff);),                                           \
  OP("add." name "x2 add.rn." name "x2", pair<type>, (pair<type> a, pair<type> b),                                 \
        return {type(f32(a.low) + f32(b.low)), type(f32(a.high) + f32(b.high))};),                                    \
  OP("sub." name "x2 sub.rn." name "x2", pair<type>, (pair<type> a, pair<type> b),                                 \
        return {type(f32(a.low) - f32(b.low)), type(f32(a.high) - f32(b.high))};),                                    \
  OP("mul." name "x2 mul.rn." name "x2", pair<type>, (pair<type> a, pair<type> b),                                 \
        return {type(f32(a.low) * f32(b.low)), type(f32(a.high) * f32(b.high))};),                                    \
  OP("fma.rn." name "x2", pair<type>, (pair<type> a, pair<type> b, pair<type> c),                                  \
        return {fma_once(a.low, b.low, c.low), fma_once(a.high, b.high, c.high)};),                                   \
  OP("min." name "x2", pair<type>, (pair<type> a, pair<type> b),                                                   \
        return {type(minimum(a.low, b.low)), type(minimum(a.high, b.high))};),                                        \
  OP("max." name "x2", pair<type>, (pair<type> a, pair<type> b),                                                   \
        return {type(maximum(a.low, b.low)), type(maximum(a.high, b.high))};),                                        \
  OP("neg." name "x2", pair<type>, (pair<type> a),                                                                 \
        return {type::of(a.low.pattern ^ 0x8000), type::of(a.high.pattern ^ 0x8000)};)

// Two f32 in a register of 64 bits.
#define TWO_F32(ftz, round)                                                                                          \
  OP("add" ftz ".f32x2 add.rn" ftz ".f32x2", pair<f32>, (pair<f32> a, pair<f32> b),                                  \
        return {round(round(a.low) + round(b.low)), round(round(a.high) + round(b.high))};),                         \
  OP("sub" ftz ".f32x2 sub.rn" ftz ".f32x2", pair<f32>, (pair<f32> a, pair<f32> b),                                  \
        return {round(round(a.low) - round(b.low)), round(round(a.high) - round(b.high))};),                         \
  OP("mul" ftz ".f32x2 mul.rn" ftz ".f32x2", pair<f32>, (pair<f32> a, pair<f32> b),                                  \
        return {round(round(a.low) * round(b.low)), round(round(a.high) * round(b.high))};),                         \
  OP("fma.rn" ftz ".f32x2", pair<f32>, (pair<f32> a, pair<f32> b, pair<f32> c),                                      \
        return {round(std::fma(round(a.low), round(b.low), round(c.low))),                                           \
                round(std::fma(round(a.high), round(b.high), round(c.high)))};)

inline const Entry TABLE[] = {
  // Integer Arithmetic Instructions. Division by zero gives all ones (the ISA leaves it open), the remainder the
  // dividend.
  OP("add.s32 add.u32", u32, (u32 a, u32 b), return a + b;),
  OP("sub.s32 sub.u32", u32, (u32 a, u32 b), return a - b;),
  OP("add.s64 add.u64", u64, (u64 a, u64 b), return a + b;),
  OP("sub.s64 sub.u64", u64, (u64 a, u64 b), return a - b;),
  OP("add.s16 add.u16", u16, (u16 a, u16 b), return a + b;),
  OP("sub.s16 sub.u16", u16, (u16 a, u16 b), return a - b;),
  OP("mul.lo.s32 mul.lo.u32", u32, (u32 a, u32 b), return a * b;),
  OP("mul.lo.s64 mul.lo.u64", u64, (u64 a, u64 b), return a * b;),
  OP("mul.lo.s16 mul.lo.u16", u16, (u16 a, u16 b), return u32(a) * b;),
  OP("mul.hi.s32", s32, (s32 a, s32 b), return s64(a) * b >> 32;),
  OP("mul.hi.u32", u32, (u32 a, u32 b), return u64(a) * b >> 32;),
  OP("mul.hi.s64", s64, (s64 a, s64 b), return s64(__int128(a) * b >> 64);),
  OP("mul.hi.u64", u64, (u64 a, u64 b), return u64((unsigned __int128)(a) * b >> 64);),
  OP("mul.hi.s16", s16, (s16 a, s16 b), return s32(a) * b >> 16;),
  OP("mul.hi.u16", u16, (u16 a, u16 b), return u32(a) * b >> 16;),
  OP("mul.wide.s32", s64, (s32 a, s32 b), return s64(a) * b;),
  OP("mul.wide.u32", u64, (u32 a, u32 b), return u64(a) * b;),
  OP("mul.wide.s16", s32, (s16 a, s16 b), return s32(a) * b;),
  OP("mul.wide.u16", u32, (u16 a, u16 b), return u32(a) * b;),
  OP("mad.lo.s32 mad.lo.u32", u32, (u32 a, u32 b, u32 c), return a * b + c;),
  OP("mad.lo.s64 mad.lo.u64", u64, (u64 a, u64 b, u64 c), return a * b + c;),
  OP("mad.lo.s16 mad.lo.u16", u16, (u16 a, u16 b, u16 c), return u32(a) * b + c;),
  OP("mad.hi.s32", u32, (s32 a, s32 b, u32 c), return u32(s64(a) * b >> 32) + c;),
  OP("mad.hi.u32", u32, (u32 a, u32 b, u32 c), return u32(u64(a) * b >> 32) + c;),
  OP("mad.wide.s32", u64, (s32 a, s32 b, u64 c), return u64(s64(a) * b) + c;),
  OP("mad.wide.u32", u64, (u32 a, u32 b, u64 c), return u64(a) * b + c;),
  OP("mad.wide.s16", u32, (s16 a, s16 b, u32 c), return u32(s32(a) * b) + c;),
  OP("mad.wide.u16", u32, (u16 a, u16 b, u32 c), return u32(a) * b + c;),
  OP("div.s32", s32, (s32 a, s32 b), return b == 0 ? -1 : b == -1 ? s32(0u - u32(a)) : a / b;),
  OP("div.u32", u32, (u32 a, u32 b), return b == 0 ? ~0u : a / b;),
  OP("div.s64", s64, (s64 a, s64 b), return b == 0 ? -1 : b == -1 ? s64(0ull - u64(a)) : a / b;),
  OP("div.u64", u64, (u64 a, u64 b), return b == 0 ? ~0ull : a / b;),
  OP("div.s16", s16, (s16 a, s16 b), return b == 0 ? -1 : a / b;),
  OP("div.u16", u16, (u16 a, u16 b), return b == 0 ? 0xffff : a / b;),
  OP("rem.s16", s16, (s16 a, s16 b), return b == 0 ? a : a % b;),
  OP("rem.u16", u16, (u16 a, u16 b), return b == 0 ? a : a % b;),
  OP("rem.s32", s32, (s32 a, s32 b), return b == 0 ? a : b == -1 ? 0 : a % b;),
  OP("rem.u32", u32, (u32 a, u32 b), return b == 0 ? a : a % b;),
  OP("rem.s64", s64, (s64 a, s64 b), return b == 0 ? a : b == -1 ? 0 : a % b;),
  OP("rem.u64", u64, (u64 a, u64 b), return b == 0 ? a : a % b;),
  OP("abs.s32", u32, (s32 a), return a < 0 ? 0u - u32(a) : u32(a);),
  OP("abs.s16", u16, (s16 a), return u16(a < 0 ? -a : a);),
  OP("abs.s64", u64, (s64 a), return a < 0 ? 0ull - u64(a) : u64(a);),
  OP("neg.s32", u32, (u32 a), return 0u - a;),
  OP("neg.s64", u64, (u64 a), return 0ull - a;),
  OP("neg.s16", u16, (u16 a), return u16(0u - a);),
  OP("min.s32", s32, (s32 a, s32 b), return std::min(a, b);),
  OP("max.s32", s32, (s32 a, s32 b), return std::max(a, b);),
  OP("min.u32", u32, (u32 a, u32 b), return std::min(a, b);),
  OP("max.u32", u32, (u32 a, u32 b), return std::max(a, b);),
  OP("min.s64", s64, (s64 a, s64 b), return std::min(a, b);),
  OP("max.s64", s64, (s64 a, s64 b), return std::max(a, b);),
  OP("min.u64", u64, (u64 a, u64 b), return std::min(a, b);),
  OP("max.u64", u64, (u64 a, u64 b), return std::max(a, b);),
  OP("min.s16", s16, (s16 a, s16 b), return std::min(a, b);),
  OP("max.s16", s16, (s16 a, s16 b), return std::max(a, b);),
  OP("min.u16", u16, (u16 a, u16 b), return std::min(a, b);),
  OP("max.u16", u16, (u16 a, u16 b), return std::max(a, b);),
  OP("min.relu.s32", s32, (s32 a, s32 b), return std::max(std::min(a, b), 0);),
  OP("max.relu.s32", s32, (s32 a, s32 b), return std::max(std::max(a, b), 0);),
  OP("popc.b32", u32, (u32 a), return u32(std::popcount(a));),
  OP("popc.b64", u32, (u64 a), return u32(std::popcount(a));),
  OP("clz.b32", u32, (u32 a), return u32(std::countl_zero(a));),
  OP("clz.b64", u32, (u64 a), return u32(std::countl_zero(a));),
  OP("bfind.u32", u32, (u32 a), return a ? 31u - std::countl_zero(a) : ~0u;),
  OP("brev.b32", u32, (u32 a), u32 r = 0; for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i); return r;),
  OP("brev.b64", u64, (u64 a), u64 r = 0; for (int i = 0; i < 64; i++) r |= (a >> i & 1) << (63 - i); return r;),
  OP("bfe.u32", u32, (u32 a, u32 b, u32 c), u32 at = b & 255; u32 width = c & 255;
        if (at > 31 || width == 0) return 0u; u32 r = a >> at; return width > 31 ? r : r & ((1u << width) - 1);),
  OP("bfe.s32", u32, (u32 a, u32 b, u32 c), u32 at = b & 255; u32 width = c & 255; u32 r = 0;
        if (width == 0) return 0u; u32 sign = a >> std::min(at + width - 1, 31u) & 1;
        for (u32 i = 0; i < 32; i++) r |= (i < width && at + i < 32 ? a >> (at + i) & 1 : sign) << i; return r;),
  OP("bfi.b32", u32, (u32 a, u32 b, u32 c, u32 d), u32 at = c & 255; u32 width = d & 255;
        if (at > 31 || width == 0) return b; u32 m = (width > 31 ? ~0u : (1u << width) - 1) << at;
        return (b & ~m) | (a << at & m);),

  // Floating Point Instructions, Half Precision Floating Point Instructions. Without .ftz subnormals are kept.
  OP("add.f32 add.rn.f32", f32, (f32 a, f32 b), return canonical(a + b);),
  OP("sub.f32 sub.rn.f32", f32, (f32 a, f32 b), return canonical(a - b);),
  OP("mul.f32 mul.rn.f32", f32, (f32 a, f32 b), return canonical(a * b);),
  OP("fma.rn.f32", f32, (f32 a, f32 b, f32 c), return canonical(std::fma(a, b, c));),
  OP("add.ftz.f32 add.rn.ftz.f32", f32, (f32 a, f32 b), return canonical(flush(flush(a) + flush(b)));),
  OP("sub.ftz.f32 sub.rn.ftz.f32", f32, (f32 a, f32 b), return canonical(flush(flush(a) - flush(b)));),
  OP("mul.ftz.f32 mul.rn.ftz.f32", f32, (f32 a, f32 b), return canonical(flush(flush(a) * flush(b)));),
  OP("fma.rn.ftz.f32", f32, (f32 a, f32 b, f32 c), return canonical(flush(std::fma(flush(a), flush(b), flush(c))));),
  OP("div.rn.f32 div.full.f32 div.approx.f32", f32, (f32 a, f32 b), return canonical(a / b);),
  OP("div.rn.ftz.f32 div.full.ftz.f32 div.approx.ftz.f32", f32, (f32 a, f32 b),
        return canonical(flush(flush(a) / flush(b)));),
  OP("rcp.rn.f32 rcp.approx.f32", f32, (f32 a), return canonical(1 / a);),
  OP("rcp.rn.ftz.f32 rcp.approx.ftz.f32", f32, (f32 a), return canonical(flush(1 / flush(a)));),
  OP("sqrt.rn.f32 sqrt.approx.f32", f32, (f32 a), return canonical(std::sqrt(a));),
  OP("sqrt.rn.ftz.f32 sqrt.approx.ftz.f32", f32, (f32 a), return canonical(flush(std::sqrt(flush(a))));),
  OP("rsqrt.approx.f32", f32, (f32 a), return canonical(f32(1 / std::sqrt(f64(a))));),
  OP("rsqrt.approx.ftz.f32", f32, (f32 a), return canonical(f32(1 / std::sqrt(f64(flush(a)))));),
  OP("ex2.approx.f32", f32, (f32 a), return canonical(f32(std::exp2(f64(a))));),
  OP("ex2.approx.ftz.f32", f32, (f32 a), return canonical(flush(std::exp2(flush(a))));),
  OP("lg2.approx.f32", f32, (f32 a), return canonical(f32(std::log2(f64(a))));),
  OP("lg2.approx.ftz.f32", f32, (f32 a), return canonical(f32(std::log2(f64(flush(a)))));),
  OP("sin.approx.f32", f32, (f32 a), return canonical(std::sin(a));),
  OP("cos.approx.f32", f32, (f32 a), return canonical(std::cos(a));),
  OP("sin.approx.ftz.f32", f32, (f32 a), return canonical(flush(std::sin(flush(a))));),
  OP("cos.approx.ftz.f32", f32, (f32 a), return canonical(std::cos(flush(a)));),
  OP("tanh.approx.f32", f32, (f32 a), return canonical(std::tanh(a));),
  OP("neg.f32", u32, (u32 a), return a ^ 0x80000000u;),
  OP("abs.f32", u32, (u32 a), return a & 0x7fffffffu;),
  OP("neg.ftz.f32", f32, (f32 a), return from_bits(bits(flush(a)) ^ 0x80000000u);),
  OP("abs.ftz.f32", f32, (f32 a), return std::fabs(flush(a));),
  OP("copysign.f32", u32, (u32 a, u32 b), return (a & 0x80000000u) | (b & 0x7fffffffu);),
  OP("min.f32", f32, (f32 a, f32 b), return minimum(a, b);),
  OP("max.f32", f32, (f32 a, f32 b), return maximum(a, b);),
  OP("min.NaN.f32", f32, (f32 a, f32 b), return minimum_nan(a, b);),
  OP("max.NaN.f32", f32, (f32 a, f32 b), return maximum_nan(a, b);),
  OP("min.ftz.f32", f32, (f32 a, f32 b), return minimum(flush(a), flush(b));),
  OP("max.ftz.f32", f32, (f32 a, f32 b), return maximum(flush(a), flush(b));),
  OP("min.ftz.NaN.f32", f32, (f32 a, f32 b), return minimum_nan(flush(a), flush(b));),
  OP("max.ftz.NaN.f32", f32, (f32 a, f32 b), return maximum_nan(flush(a), flush(b));),
  OP("min.xorsign.abs.f32", f32, (f32 a, f32 b),
        return with_sign_of_product(minimum(std::fabs(a), std::fabs(b)), a, b);),
  OP("max.xorsign.abs.f32", f32, (f32 a, f32 b),
        return with_sign_of_product(maximum(std::fabs(a), std::fabs(b)), a, b);),
  OP("add.f64 add.rn.f64", f64, (f64 a, f64 b), return a + b;),
  OP("sub.f64 sub.rn.f64", f64, (f64 a, f64 b), return a - b;),
  OP("mul.f64 mul.rn.f64", f64, (f64 a, f64 b), return a * b;),
  OP("fma.rn.f64", f64, (f64 a, f64 b, f64 c), return std::fma(a, b, c);),
  OP("div.rn.f64", f64, (f64 a, f64 b), return a / b;),
  OP("sqrt.rn.f64", f64, (f64 a), return std::sqrt(a);),
  TWO_F32("", canonical),
  TWO_F32(".ftz", flush_canonical),
  OP("min.f64", f64, (f64 a, f64 b), return minimum(a, b);),
  OP("max.f64", f64, (f64 a, f64 b), return maximum(a, b);),
  OP("neg.f64", u64, (u64 a), return a ^ 1ull << 63;),
  OP("abs.f64", u64, (u64 a), return a & ~(1ull << 63);),
  HALF(f16, "f16"),
  HALF(bf16, "bf16"),

  // Comparison and Selection Instructions. Ordered comparisons, ne included, are false where an operand is NaN.
  COMPARE_INTEGER(s16, "s16"), COMPARE_INTEGER(u16, "u16"), COMPARE_INTEGER(s32, "s32"), COMPARE_INTEGER(u32, "u32"),
  COMPARE_INTEGER(s64, "s64"), COMPARE_INTEGER(u64, "u64"),
  OP("setp.eq.b16", bool, (u16 a, u16 b), return a == b;), OP("setp.ne.b16", bool, (u16 a, u16 b), return a != b;),
  OP("setp.eq.b32", bool, (u32 a, u32 b), return a == b;), OP("setp.ne.b32", bool, (u32 a, u32 b), return a != b;),
  OP("setp.eq.b64", bool, (u64 a, u64 b), return a == b;), OP("setp.ne.b64", bool, (u64 a, u64 b), return a != b;),
  COMPARE_FLOAT(f32, "f32"), COMPARE_FLOAT(f32_ftz, "ftz.f32"),
  COMPARE_FLOAT(f64, "f64"), COMPARE_FLOAT(f16, "f16"), COMPARE_FLOAT(bf16, "bf16"),
  OP("selp.b16 selp.s16 selp.u16", u16, (u16 a, u16 b, bool c), return c ? a : b;),
  OP("selp.b32 selp.s32 selp.u32 selp.f32", u32, (u32 a, u32 b, bool c), return c ? a : b;),
  OP("selp.b64 selp.s64 selp.u64 selp.f64", u64, (u64 a, u64 b, bool c), return c ? a : b;),

  // Half Precision Comparison Instructions. A half of 1 where it is true.
  OP("set.nan.f16x2.f16x2", pair<f16>, (pair<f16> a, pair<f16> b),
        return {f16(f32(unordered(a.low, b.low))), f16(f32(unordered(a.high, b.high)))};),
  // Logic and Shift Instructions. A shift by the width or more gives zero, or the sign.
  OP("and.b16", u16, (u16 a, u16 b), return a & b;),
  OP("or.b16", u16, (u16 a, u16 b), return a | b;),
  OP("xor.b16", u16, (u16 a, u16 b), return a ^ b;),
  OP("not.b16", u16, (u16 a), return ~a;),
  OP("and.b32", u32, (u32 a, u32 b), return a & b;),
  OP("or.b32", u32, (u32 a, u32 b), return a | b;),
  OP("xor.b32", u32, (u32 a, u32 b), return a ^ b;),
  OP("not.b32", u32, (u32 a), return ~a;),
  OP("and.b64", u64, (u64 a, u64 b), return a & b;),
  OP("or.b64", u64, (u64 a, u64 b), return a | b;),
  OP("xor.b64", u64, (u64 a, u64 b), return a ^ b;),
  OP("not.b64", u64, (u64 a), return ~a;),
  OP("and.pred", bool, (bool a, bool b), return a && b;),
  OP("or.pred", bool, (bool a, bool b), return a || b;),
  OP("xor.pred", bool, (bool a, bool b), return a != b;),
  OP("not.pred", bool, (bool a), return !a;),
  OP("shl.b16", u16, (u16 a, u32 b), return b > 15 ? 0 : a << b;),
  OP("shl.b32", u32, (u32 a, u32 b), return b > 31 ? 0 : a << b;),
  OP("shl.b64", u64, (u64 a, u32 b), return b > 63 ? 0 : a << b;),
  OP("shr.u16 shr.b16", u16, (u16 a, u32 b), return b > 15 ? 0 : a >> b;),
  OP("shr.u32 shr.b32", u32, (u32 a, u32 b), return b > 31 ? 0 : a >> b;),
  OP("shr.u64 shr.b64", u64, (u64 a, u32 b), return b > 63 ? 0 : a >> b;),
  OP("shr.s16", s16, (s16 a, u32 b), return a >> std::min(b, 15u);),
  OP("shr.s32", s32, (s32 a, u32 b), return a >> std::min(b, 31u);),
  OP("shr.s64", s64, (s64 a, u32 b), return a >> std::min(b, 63u);),
  OP("shf.l.wrap.b32", u32, (u32 a, u32 b, u32 c), return (u64(b) << 32 | a) << (c & 31) >> 32;),
  OP("shf.r.wrap.b32", u32, (u32 a, u32 b, u32 c), return (u64(b) << 32 | a) >> (c & 31);),
  OP("shf.l.clamp.b32", u32, (u32 a, u32 b, u32 c), return c > 31 ? a : (u64(b) << 32 | a) << c >> 32;),
  OP("shf.r.clamp.b32", u32, (u32 a, u32 b, u32 c), return (u64(b) << 32 | a) >> std::min(c, 32u);),
  OP("lop3.b32", u32, (u32 a, u32 b, u32 c, u32 table), u32 r = 0;
        for (int k = 0; k < 8; k++) if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
        return r;),

  // Data Movement and Conversion Instructions. mov of vectors is split into packs and unpacks when it is decoded.
  MOVE(LOW_HALF, "mov.b16 mov.u16 mov.s16 mov.f16", u16, (u16 a), return a;),
  MOVE(ROWS, "mov.b32 mov.u32 mov.s32 mov.f32", u32, (u32 a), return a;),
  MOVE(ROWS, "mov.b64 mov.u64 mov.s64 mov.f64 cvta.global.u64 cvta.to.global.u64 cvta.shared.u64 cvta.to.shared.u64"
       " cvta.local.u64 cvta.to.local.u64"
       " cvt.u64.u64 cvt.s64.s64 cvt.u64.s64 cvt.s64.u64", u64, (u64 a), return a;),
  OP("mov.pred", bool, (bool a), return a;),
  OP("pack.b8", u32, (u32 a, u32 b, u32 c, u32 d), return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24;),
  MOVE(TWO_HALVES, "pack.b16", u32, (u16 a, u16 b), return a | u32(b) << 16;),
  MOVE(HIGH_HALF, "unpack.high.b16", u16, (u32 a), return a >> 16;),
  MOVE(ROWS, "pack.b32", u64, (u32 a, u32 b), return a | u64(b) << 32;),
  OP("prmt.b32", u32, (u32 a, u32 b, u32 c), u64 bytes = u64(b) << 32 | a; u32 r = 0;
        for (int i = 0; i < 4; i++) { u32 select = c >> 4 * i & 15; u32 byte = bytes >> 8 * (select & 7) & 255;
          if (select & 8) byte = byte & 128 ? 255 : 0; r |= byte << 8 * i; } return r;),
  OP("cvt.u64.u32 cvt.s64.u32", u64, (u32 a), return a;),
  OP("cvt.s64.s32 cvt.u64.s32", s64, (s32 a), return a;),
  OP("cvt.u64.u16 cvt.s64.u16", u64, (u16 a), return a;),
  OP("cvt.s64.s16 cvt.u64.s16", s64, (s16 a), return a;),
  OP("cvt.u64.u8 cvt.s64.u8", u64, (u32 a), return u8(a);),
  OP("cvt.s64.s8 cvt.u64.s8", s64, (u32 a), return s8(a);),
  OP("cvt.u32.u64 cvt.s32.s64 cvt.u32.s64 cvt.s32.u64", u32, (u64 a), return u32(a);),
  OP("cvt.u16.u64 cvt.s16.s64 cvt.u16.s64 cvt.s16.u64", u16, (u64 a), return u16(a);),
  MOVE(ROWS, "cvt.u32.u32 cvt.s32.s32 cvt.u32.s32 cvt.s32.u32", u32, (u32 a), return a;),
  MOVE(LOW_HALF, "cvt.u16.u32 cvt.s16.s32 cvt.u16.s32 cvt.s16.u32", u16, (u32 a), return a;),
  MOVE(LOW_HALF, "cvt.u16.u16 cvt.s16.s16", u16, (u16 a), return a;),
  MOVE(LOW_HALF, "cvt.u32.u16 cvt.s32.u16", u32, (u16 a), return a;),
  OP("cvt.s32.s16 cvt.u32.s16", s32, (s16 a), return a;),
  OP("cvt.u32.u8 cvt.s32.u8", u32, (u32 a), return u8(a);),
  OP("cvt.s32.s8 cvt.u32.s8", s32, (u32 a), return s8(a);),
  OP("cvt.u16.u8 cvt.s16.u8 cvt.u8.u16 cvt.u8.u32", u16, (u32 a), return u8(a);),
  OP("cvt.s16.s8 cvt.u16.s8 cvt.s8.s16 cvt.s8.s32", s16, (u32 a), return s8(a);),
  OP("cvt.u8.u64 cvt.u8.s64", u16, (u64 a), return u8(a);),
  OP("cvt.s8.u64 cvt.s8.s64", s16, (u64 a), return s8(a);),
  OP("cvt.rn.f32.s32", f32, (s32 a), return f32(a);),
  OP("cvt.rn.f32.u32", f32, (u32 a), return f32(a);),
  OP("cvt.rn.f32.s64", f32, (s64 a), return f32(a);),
  OP("cvt.rn.f32.u64", f32, (u64 a), return f32(a);),
  OP("cvt.rn.f32.s16", f32, (s16 a), return a;),
  OP("cvt.rn.f32.u16", f32, (u16 a), return a;),
  OP("cvt.rn.f32.s8", f32, (u32 a), return s8(a);),
  OP("cvt.rn.f32.u8", f32, (u32 a), return u8(a);),
  OP("cvt.rn.f64.s32", f64, (s32 a), return a;),
  OP("cvt.rn.f64.u32", f64, (u32 a), return a;),
  OP("cvt.rn.f64.s64", f64, (s64 a), return f64(a);),
  OP("cvt.rn.f64.u64", f64, (u64 a), return f64(a);),
  OP("cvt.f64.f32", f64, (f32 a), return a;),
  OP("cvt.rn.f32.f64", f32, (f64 a), return canonical(f32(a));),
  OP("cvt.rzi.s32.f32 cvt.rzi.ftz.s32.f32", s32, (f32 a), return to_integer<s32>(a);),
  OP("cvt.rni.s32.f32 cvt.rni.ftz.s32.f32", s32, (f32 a), return to_integer<s32>(std::nearbyint(a));),
  OP("cvt.rmi.ftz.s32.f32", s32, (f32 a), return to_integer<s32>(std::floor(flush(a)));),
  OP("cvt.rpi.ftz.s32.f32", s32, (f32 a), return to_integer<s32>(std::ceil(flush(a)));),
  OP("cvt.rmi.s32.f32", s32, (f32 a), return to_integer<s32>(std::floor(a));),
  OP("cvt.rpi.s32.f32", s32, (f32 a), return to_integer<s32>(std::ceil(a));),
  OP("cvt.rzi.u32.f32 cvt.rzi.ftz.u32.f32", u32, (f32 a), return to_integer<u32>(a);),
  OP("cvt.rni.u32.f32 cvt.rni.ftz.u32.f32", u32, (f32 a), return to_integer<u32>(std::nearbyint(a));),
  OP("cvt.rzi.s64.f32 cvt.rzi.ftz.s64.f32", s64, (f32 a), return to_integer<s64>(a);),
  OP("cvt.rzi.u64.f32 cvt.rzi.ftz.u64.f32", u64, (f32 a), return to_integer<u64>(a);),
  OP("cvt.rmi.f32.f32", f32, (f32 a), return canonical(std::floor(a));),
  OP("cvt.rpi.f32.f32", f32, (f32 a), return canonical(std::ceil(a));),
  OP("cvt.rni.f32.f32", f32, (f32 a), return canonical(std::nearbyint(a));),
  OP("cvt.rzi.f32.f32", f32, (f32 a), return canonical(std::trunc(a));),
  OP("cvt.rmi.ftz.f32.f32", f32, (f32 a), return canonical(std::floor(flush(a)));),
  OP("cvt.rpi.ftz.f32.f32", f32, (f32 a), return canonical(std::ceil(flush(a)));),
  OP("cvt.rni.ftz.f32.f32", f32, (f32 a), return canonical(std::nearbyint(flush(a)));),
  OP("cvt.rzi.ftz.f32.f32", f32, (f32 a), return canonical(std::trunc(flush(a)));),
  OP("cvt.rzi.s32.f64", s32, (f64 a), return to_integer<s32>(a);),
  OP("cvt.rzi.u32.f64", u32, (f64 a), return to_integer<u32>(a);),
  OP("cvt.rzi.s64.f64", s64, (f64 a), return to_integer<s64>(a);),
  OP("cvt.rzi.u64.f64", u64, (f64 a), return to_integer<u64>(a);),
  OP("cvt.rmi.f64.f64", f64, (f64 a), return std::floor(a);),
  OP("cvt.rpi.f64.f64", f64, (f64 a), return std::ceil(a);),
  OP("cvt.rni.f64.f64", f64, (f64 a), return std::nearbyint(a);),
  OP("cvt.rzi.f64.f64", f64, (f64 a), return std::trunc(a);),
  OP("cvt.ftz.sat.f32.f32", f32, (f32 a), return flush(a) > 0 ? std::min(a, 1.0f) : 0.0f;),
  OP("cvt.sat.f32.f32", f32, (f32 a), return a > 0 ? std::min(a, 1.0f) : 0.0f;),
  OP("cvt.f32.f16", f32, (f16 a), return canonical(a);),
  OP("cvt.f32.bf16", u32, (u16 a), return u32(a) << 16;),
  OP("cvt.rn.f16.f32", f16, (f32 a), return f16(a);),
  OP("cvt.rn.bf16.f32", bf16, (f32 a), return bf16(a);),
  OP("cvt.rz.bf16.f32", u16, (u32 a), return std::isnan(from_bits(a)) ? 0x7fff : a >> 16;),
  OP("cvt.rz.f16.f32", f16, (f32 a), return toward_zero(a);),
  OP("cvt.rz.f16x2.f32", pair<f16>, (f32 a, f32 b), return {toward_zero(b), toward_zero(a)};),
  OP("cvt.rn.bf16.f16", bf16, (f16 a), return bf16(a);),
  OP("cvt.rn.f16.bf16", f16, (bf16 a), return f16(a);),
  OP("cvt.rn.f16x2.f32", pair<f16>, (f32 a, f32 b), return {f16(b), f16(a)};),  // the first operand is the upper half
  OP("cvt.rn.bf16x2.f32", pair<bf16>, (f32 a, f32 b), return {bf16(b), bf16(a)};),
  OP("cvt.rna.tf32.f32", u32, (u32 a), return (a & 0x7f800000) == 0x7f800000 ? a : (a + 0x1000) & ~0x1fffu;),
  OP("cvt.rn.satfinite.e4m3x2.f32", u16, (f32 a, f32 b), return f32_to_e4m3(a) << 8 | f32_to_e4m3(b);),
  OP("cvt.rn.satfinite.e5m2x2.f32", u16, (f32 a, f32 b), return f32_to_e5m2(a) << 8 | f32_to_e5m2(b);),
  OP("cvt.rn.satfinite.e4m3x2.f16x2", u16, (pair<f16> a), return f32_to_e4m3(a.high) << 8 | f32_to_e4m3(a.low);),
  OP("cvt.rn.satfinite.e5m2x2.f16x2", u16, (pair<f16> a), return f32_to_e5m2(a.high) << 8 | f32_to_e5m2(a.low);),
  OP("cvt.rn.f16x2.e4m3x2", pair<f16>, (u16 a), return {f16(e4m3_to_f32(a)), f16(e4m3_to_f32(a >> 8))};),
  OP("cvt.rn.f16x2.e5m2x2", pair<f16>, (u16 a), return {f16::of(a << 8), f16::of(a & 0xff00)};),
};

#undef OP
#undef MOVE
#undef COMPARE
#undef COMPARE_INTEGER
#undef COMPARE_FLOAT
#undef HALF
}  // namespace arithmetic
