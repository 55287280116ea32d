// Instructions that are more than a function of a lane: control, memory, barriers, matrices, asynchronous copies.
// Sections are named by their titles in the PTX ISA, whose numbers differ between versions.
#pragma once
#include "counting.h"

namespace instructions {

inline const s32* operands(Machine& m, const Instruction& in) { return m.launch.pool + in.first; }

inline u64 wide(Warp& w, int row, int lane) { return w.row(row)[lane] | u64(w.row(row)[LANES + lane]) << 32; }

inline u64 address(Warp& w, int row, int lane, s32 offset, bool is_wide) {
  return is_wide ? wide(w, row, lane) + s64(offset) : u64(u32(w.row(row)[lane] + offset));
}

inline void set(Warp& w, int row, u32 mask, int lane, u32 value) {
  if (mask >> lane & 1) w.row(row)[lane] = value;
}
inline void set_predicate(Warp& w, int predicate, u32 mask, u32 value) {
  w.predicates[predicate] = (w.predicates[predicate] & ~mask) | (value & mask);
}

// .aligned: all lanes of the warp execute it together.
inline bool aligned(Machine& m, Warp& w, u32 mask) {
  if (mask == ALL_LANES) return true;
  m.report(DIVERGENCE, w.pc, w.id, only_lane(~mask), 0, -1, "lanes %08x of the warp execute it", mask);
  return mask != 0;
}

template <class F>
void each(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

// What ld, st and atom ask for, in the space of theirs.
template <class At>
void count_access(Machine& m, int pc, u32 mask, bool is_shared, At at, u32 bytes, bool reads, bool writes) {
  if (is_shared)
    m.count_shared(pc, LANES, mask, at, bytes);
  else
    m.count_global(pc, mask, at, [&](int) { return bytes; }, reads, writes);
}

// ---- Control Flow Instructions
// m: target, and where lanes that it parts come together; -1: nowhere

inline void diverge(Warp& w, int pc) {
  if (!w.diverged) std::fill(w.lane_pc, w.lane_pc + LANES, pc);
  w.diverged = true;
}

inline void bra(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  if (mask == w.active && !w.diverged) {
    m.next_pc = in.m[0];
    return;
  }
  if (mask && mask != w.active && in.m[1] >= 0) w.joins.push_back({in.m[1], w.active});
  diverge(w, w.pc + 1);
  each(w.active, [&](int lane) { w.lane_pc[lane] = mask >> lane & 1 ? in.m[0] : w.pc + 1; });
  m.next_pc = -1;
}

// operand: the index; m: number of targets, their place in the pool
inline void brx(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const u32* index = w.row(operands(m, in)[0]);
  int lane = only_lane(mask);
  each(mask, [&](int l) {
    if (index[l] != index[lane])
      m.report(UNSUPPORTED, w.pc, w.id, l, 0, -1, "brx.idx with different targets in a warp");
  });
  if (index[lane] >= u32(in.m[0]))
    m.report(TRAP, w.pc, w.id, lane, 0, -1, "index %u of %d targets", index[lane], in.m[0]);
  else
    m.next_pc = m.launch.pool[in.m[1] + index[lane]];
}

inline void ret(Machine& m, Warp& w, const Instruction&, u32 mask) {
  w.alive &= ~mask;
  if (!w.alive) {
    m.next_pc = -1;
    return m.exit_warp(w);
  }
  diverge(w, w.pc + 1);
  each(w.active, [&](int lane) { w.lane_pc[lane] = w.pc + 1; });
  m.next_pc = -1;
}

inline void trap(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  m.report(TRAP, w.pc, w.id, only_lane(mask), 0, -1, "trap");
  ret(m, w, in, mask);
}

inline void nothing(Machine&, Warp&, const Instruction&, u32) {}

// ---- Parallel Synchronization and Communication Instructions: barrier
// operands: barrier, number of threads or -1; m: waits, aligned

inline void bar(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  if (in.m[1]) aligned(m, w, mask);
  int lane = only_lane(mask), needed = o[1] >= 0 ? s32(w.row(o[1])[lane]) : m.launch.threads;
  m.arrive(w, w.pc, w.row(o[0])[lane], needed, in.m[0]);
}

// A fence for the whole device: strong reads before it acquire, strong writes after it release.
inline void membar(Machine& m, Warp& w, const Instruction&, u32) {
  m.global_fence = true;
  for (u64 address : m.observed) m.acquire(w, address);
  m.observed.clear();
}

// What the warp writes after it is of a new time, which the fence does not cover.
inline void fence_proxy_async(Machine&, Warp& w, const Instruction&, u32 mask) {
  w.fenced.join(w.known_to(mask));
  w.clock.at[w.id]++;
}

// ---- Data Movement and Conversion Instructions: ld, st
// operands: address, registers; m: offset, bytes of an element, space (0 global, 1 shared, 2 parameters, 3 local),
// 64-bit address, signed, 64-bit registers, an Order of global memory

enum Order { WEAK, RELAXED, ACQUIRES, RELEASES };

inline void put_loaded(Warp& w, const Instruction& in, int row, int lane, const u8* from) {
  u64 value = 0;
  std::memcpy(&value, from, in.m[1]);
  int unused = 64 - 8 * in.m[1];
  if (in.m[4]) value = u64(s64(value << unused) >> unused);
  w.row(row)[lane] = u32(value);
  if (in.m[5]) w.row(row)[LANES + lane] = u32(value >> 32);
}

inline void ld(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  const u32 size = in.m[1], bytes = size * (in.count - 1);
  u32 unwritten = 0;
  if (m.launch.counts && in.m[2] < 2) {
    auto at = [&](int lane) { return address(w, o[0], lane, in.m[0], in.m[3]); };
    count_access(m, w.pc, mask, in.m[2] == 1, at, bytes, true, false);
  }
  each(mask, [&](int lane) {
    u64 at = address(w, o[0], lane, in.m[0], in.m[3]);
    const u8* from = nullptr;
    if (in.m[2] == 1) {
      if (m.shared_range(w, w.pc, lane, at, bytes, bytes)) {
        unwritten |= m.read_shared(w, w.pc, lane, at - SHARED_BASE, bytes);
        from = &m.shared[at - SHARED_BASE];
      }
    } else if (in.m[2] == 2) {
      if (at + bytes <= u64(m.launch.param_bytes))
        from = m.launch.params + at;
      else
        m.report(GLOBAL_BOUNDS, w.pc, w.id, lane, at, -1, "parameters have %d bytes", m.launch.param_bytes);
    } else if (in.m[2] == 3) {
      from = m.local(w, w.pc, lane, at, bytes);
    } else if (at % bytes) {
      m.report(MISALIGNED, w.pc, w.id, lane, at, -1, "%u bytes", bytes);
    } else {
      from = m.global(w, {w.pc, lane, at, bytes, in.m[6] ? Machine::STRONG_LOAD : Machine::LOAD});
      if (in.m[6] == ACQUIRES) m.acquire(w, at);
      if (in.m[6] == RELAXED) m.observed.insert(at);
    }
    if (!from) return;
    for (int j = 0; j < in.count - 1; j++)
      if (o[1 + j] >= 0) put_loaded(w, in, o[1 + j], lane, from + j * size);
  });
  if (in.m[6]) {  // the same again: it may be the others that it waits for
    u64 at = address(w, o[0], only_lane(mask), in.m[0], in.m[3]);
    m.yielded = at == w.strong_read;
    w.strong_read = at;
  }
  if (!unwritten) return;
  for (int j = 0; j < in.count - 1; j++) {
    u32 of_element = unwritten >> j * size & ((1u << size) - 1);
    if (o[1 + j] < 0) continue;
    if (of_element & 15) w.tags[o[1 + j]] = TAG_UNWRITTEN | (of_element & 15) << 24 | u32(w.pc);
    if (of_element >> 4) w.tags[o[1 + j] + 1] = TAG_UNWRITTEN | of_element >> 4 << 24 | u32(w.pc);
  }
}

inline void st(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  const u32 size = in.m[1], bytes = size * (in.count - 1);
  if (m.launch.counts && in.m[2] < 2) {
    auto at = [&](int lane) { return address(w, o[0], lane, in.m[0], in.m[3]); };
    count_access(m, w.pc, mask, in.m[2] == 1, at, bytes, false, true);
  }
  each(mask, [&](int lane) {
    u64 at = address(w, o[0], lane, in.m[0], in.m[3]);
    u8 data[32];
    for (int j = 0; j < in.count - 1; j++) {
      u64 value = in.m[5] ? wide(w, o[1 + j], lane) : w.row(o[1 + j])[lane];
      std::memcpy(data + j * size, &value, size);
    }
    if (in.m[2] == 1) {
      if (!m.shared_range(w, w.pc, lane, at, bytes, bytes)) return;
      u32 offset = at - SHARED_BASE;
      m.write_shared(w, w.pc, lane, offset, bytes, data);
      // Bytes that nobody wrote stay so when they are copied.
      for (int j = 0; j < in.count - 1; j++)
        for (u32 i = 0; i < size; i++)
          if (u32 tag = w.tags[o[1 + j] + i / 4]; tag & TAG_UNWRITTEN && tag >> 24 >> i % 4 & 1)
            m.forget(offset + j * size + i, 1);
    } else if (in.m[2] == 3) {
      if (u8* to = m.local(w, w.pc, lane, at, bytes)) std::memcpy(to, data, bytes);
    } else if (at % bytes) {
      m.report(MISALIGNED, w.pc, w.id, lane, at, -1, "%u bytes", bytes);
    } else if (u8* to = m.global(w, {w.pc, lane, at, bytes, in.m[6] ? Machine::STRONG_STORE : Machine::STORE, data})) {
      std::memcpy(to, data, bytes);
      if (in.m[6] == RELEASES || (in.m[6] && m.global_fence)) m.release(w, mask, at, true);
    }
  });
}

// ---- Extended-Precision Integer Arithmetic Instructions
// operands: result, a, b, c or -1; m: 0 add, 1 sub, 2 mad.lo, 3 mad.hi; takes a carry, leaves one

inline void extended(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  each(mask, [&](int lane) {
    u64 a = w.row(o[1])[lane], b = w.row(o[2])[lane], carry = in.m[1] ? w.carry >> lane & 1 : 0;
    if (in.m[0] >= 2) a = in.m[0] == 2 ? u32(a * b) : a * b >> 32, b = w.row(o[3])[lane];
    u64 result = in.m[0] == 1 ? a - b - carry : a + b + carry;
    w.row(o[0])[lane] = u32(result);
    if (in.m[2]) w.carry = (w.carry & ~(1u << lane)) | u32(result >> 32 & 1) << lane;
  });
}

// ---- Parallel Synchronization and Communication Instructions: atom, red
// operands: address, value, compared value or -1, result or -1, once for each element of a vector; m: offset, bytes,
// shared, 64-bit address, operation, type, acquire, release

enum Operation { A_ADD, A_MIN, A_MAX, A_AND, A_OR, A_XOR, A_EXCH, A_CAS, A_INC, A_DEC };
enum Type { T_UNSIGNED, T_SIGNED, T_F32, T_F64, T_F16, T_BF16, T_F16X2, T_BF16X2, T_F32_FTZ };

template <class T>
u64 combine_as(int operation, u64 old, u64 value) {
  T a, b;
  std::memcpy(&a, &old, sizeof a), std::memcpy(&b, &value, sizeof b);
  T result = operation == A_ADD ? T(a + b) : operation == A_MIN ? (b < a ? b : a) : (a < b ? b : a);
  u64 pattern = 0;
  std::memcpy(&pattern, &result, sizeof result);
  return pattern;
}

inline u64 combine(int operation, int type, u32 bytes, u64 old, u64 value, u64 compared) {
  switch (operation) {
    case A_AND:
      return old & value;
    case A_OR:
      return old | value;
    case A_XOR:
      return old ^ value;
    case A_EXCH:
      return value;
    case A_CAS:
      return old == compared ? value : old;
    case A_INC:
      return old >= value ? 0 : old + 1;
    case A_DEC:
      return old == 0 || old > value ? value : old - 1;
  }
  switch (type) {
    case T_SIGNED:
      return bytes == 8 ? combine_as<s64>(operation, old, value) : combine_as<s32>(operation, old, value);
    case T_F32:
      return combine_as<f32>(operation, old, value);
    case T_F32_FTZ: {
      f32 sum = flush(flush(from_bits(u32(old))) + flush(from_bits(u32(value))));
      return bits(canonical(sum));
    }
    case T_F64:
      return combine_as<f64>(operation, old, value);
    case T_F16:
      return combine_as<f16>(operation, old, value);
    case T_BF16:
      return combine_as<bf16>(operation, old, value);
    case T_F16X2:
      return combine_as<f16>(operation, old, value) | combine_as<f16>(operation, old >> 16, value >> 16) << 16;
    case T_BF16X2:
      return combine_as<bf16>(operation, old, value) | combine_as<bf16>(operation, old >> 16, value >> 16) << 16;
    default:
      return bytes == 8 ? combine_as<u64>(operation, old, value) : combine_as<u32>(operation, old, value);
  }
}

inline void atom(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  const u32 bytes = in.m[1];
  auto value = [&](int row, int lane) { return row < 0 ? 0 : bytes == 8 ? wide(w, row, lane) : u64(w.row(row)[lane]); };
  if (m.launch.counts) {
    auto at = [&](int lane) { return address(w, o[0], lane, in.m[0], in.m[3]); };
    count_access(m, w.pc, mask, in.m[2], at, bytes * ((in.count - 1) / 3), true, true);
  }
  each(mask, [&](int lane) {
    u64 at = address(w, o[0], lane, in.m[0], in.m[3]);
    if (!in.m[2] && (in.m[6] || m.global_fence)) m.acquire(w, at);
    for (int j = 1; j + 2 < in.count; j += 3, at += bytes) {
      u8* to = nullptr;
      if (at % bytes)
        m.report(MISALIGNED, w.pc, w.id, lane, at, -1, "%u bytes", bytes);
      else if (!in.m[2])
        to = m.global(w, {w.pc, lane, at, bytes, Machine::ATOMIC});
      else if (m.shared_range(w, w.pc, lane, at, bytes, bytes))
        to = &m.shared[at - SHARED_BASE];
      if (!to) return;
      u64 old = 0;
      std::memcpy(&old, to, bytes);
      u64 result = combine(in.m[4], in.m[5], bytes, old, value(o[j], lane), value(o[j + 1], lane));
      std::memcpy(to, &result, bytes);
      if (in.m[2]) m.mark_written(at - SHARED_BASE, bytes, w.id, 0, w.pc, true, 1u << lane);
      if (o[j + 2] >= 0) w.row(o[j + 2])[lane] = u32(old);
      if (o[j + 2] >= 0 && bytes == 8) w.row(o[j + 2])[LANES + lane] = u32(old >> 32);
    }
    if (!in.m[2] && (in.m[7] || m.global_fence)) m.release(w, mask, address(w, o[0], lane, in.m[0], in.m[3]), false);
  });
}

// ---- Warp-level matrix load and store instructions: ldmatrix, stmatrix
// operands: address, a register for each matrix; m: offset, transposed, stores

inline void matrix(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  if (!aligned(m, w, mask)) return;
  const s32* o = operands(m, in);
  if (m.launch.counts) {
    const int rows = 8 * (in.count - 1);
    auto at = [&](int row) { return w.row(o[0])[row] + in.m[0]; };
    m.count_shared(w.pc, rows, ALL_LANES, at, 16);
  }
  for (int j = 0; j < in.count - 1; j++) {
    u32* fragment = w.row(o[1 + j]);
    u16 values[8][8];
    if (in.m[2])
      for (int i = 0; i < 64; i++) {
        int row = i / 8, column = i % 8;
        if (in.m[1]) std::swap(row, column);
        values[i / 8][i % 8] = fragment[row * 4 + column / 2] >> 16 * (column % 2);
      }
    for (int row = 0; row < 8; row++) {
      int lane = 8 * j + row;
      u32 at = w.row(o[0])[lane] + in.m[0];
      if (!m.shared_range(w, w.pc, lane, at, 16, 16)) return;
      if (in.m[2]) {
        m.write_shared(w, w.pc, lane, at - SHARED_BASE, 16, (const u8*)values[row]);
        continue;
      }
      if (u32 unwritten = m.read_shared(w, w.pc, lane, at - SHARED_BASE, 16))
        m.report(UNWRITTEN, w.pc, w.id, lane, at - SHARED_BASE, -1, "shared address %u",
                 at - SHARED_BASE + std::countr_zero(unwritten));
      std::memcpy(values[row], &m.shared[at - SHARED_BASE], 16);
    }
    if (!in.m[2])
      for (int lane = 0; lane < LANES; lane++) {
        int row = lane / 4, column = lane % 4 * 2;
        fragment[lane] = in.m[1] ? values[column][row] | values[column + 1][row] << 16
                                 : values[row][column] | values[row][column + 1] << 16;
      }
  }
}

// ---- Multiply-and-Accumulate Instruction: mma, m16n8
// operands: D, A, B, C; m: type, depth, registers of A, of B, kind of sums, registers of D

inline void mma(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  if (!aligned(m, w, mask)) return;
  const s32 *d = operands(m, in), *ra = d + in.m[5], *rb = ra + in.m[2], *rc = rb + in.m[3];
  const int type = in.m[0], depth = in.m[1], bytes = element_bytes(type), per = 4 / bytes;
  if (m.launch.counts) m.launch.counts[w.pc].flops += 2 * 16 * 8 * depth;
  f32 a[16][32], b[32][8], c[16][8];
  for (int j = 0; j < in.m[2]; j++) unpack_a(type, w.row(ra[j]), j, a);
  for (int lane = 0; lane < LANES; lane++) {
    for (int j = 0; j < in.m[3]; j++)
      for (int e = 0; e < per; e++)
        b[lane % 4 * per + j * 4 * per + e][lane / 4] = element(type, w.row(rb[j])[lane] >> 8 * bytes * e);
  }
  auto before = [&](int j) { return w.row(rc[j]); };
  load_sums(in.m[4], 8, before, c);
  add_products(a, b, c, depth, 8);
  store_sums(in.m[4], 8, c, before, [&](int j) { return w.row(d[j]); });
}

// ---- Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async
// operands: D, then the descriptor or four registers of A, the descriptor of B; m: columns, type and 256 times the kind
// of sums, A in shared memory, A transposed, B transposed, sign of A, sign of B, scale-d: predicate, -1 false, -2 true

inline void wgmma(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  if (!aligned(m, w, mask)) return;
  const int num = in.m[0] / 2, num_a = in.m[2] ? 0 : 4;
  const s32 *d = operands(m, in), *a = d + num;
  // wgmma.fence: between an access to a register and a product that accesses it too, and before the first product.
  auto must_be_fenced = [&](int row, bool is_written) {
    if (w.defined[row] == w.fences)
      m.report(WGMMA_FENCE, w.pc, w.id, 0, 0, -1, "a register was written after the last wgmma.fence");
    else if (is_written && w.used[row] == w.fences)
      m.report(WGMMA_FENCE, w.pc, w.id, 0, 0, -1, "an accumulator was read after the last wgmma.fence");
  };
  if (w.fences == 1) m.report(WGMMA_FENCE, w.pc, w.id, 0, 0, -1, "it is the first of its warp");
  Product product{&in, w.pc, in.m[2] ? wide(w, a[0], 0) : 0, wide(w, in.m[2] ? a[1] : a[4], 0), {}, -1, false, m.time};
  if (m.launch.counts) {
    const int bytes = element_bytes(in.m[1] & 255), row = (w.id & 3) * 16;
    m.launch.counts[w.pc].flops += 2 * 16 * in.m[0] * (32 / bytes);
    if (in.m[2]) m.count_operand(w.pc, product.a, row, row + 16, bytes, in.m[3]);
    if (row == 0) m.count_operand(w.pc, product.b, 0, in.m[0], bytes, in.m[4]);
  }
  product.add = in.m[7] >= 0 ? w.predicates[in.m[7]] & 1 : in.m[7] == -2;
  for (int j = 0; j < num_a; j++) {
    must_be_fenced(a[j], false);
    product.a_values.insert(product.a_values.end(), w.row(a[j]), w.row(a[j]) + LANES);
  }
  u32 tag = w.tags[d[0]];
  bool continues = tag & TAG_PENDING;
  for (int j = 0; j < num; j++)
    if (continues ? w.tags[d[j]] != tag + j : w.tags[d[j]] & TAG_PENDING)
      m.report(WGMMA_REGISTER, w.pc, w.id, 0, 0, -1, "accumulators of different products in flight");
  if (continues) {
    product.accumulators = tag >> 8 & 0xffff;
  } else {
    size_t i = 0;
    while (i < m.accumulators.size() && m.accumulators[i].pending) i++;
    if (i == m.accumulators.size()) m.accumulators.emplace_back();
    product.accumulators = i;
    m.accumulators[i].values.resize(num * LANES);
    for (int j = 0; j < num; j++) {
      must_be_fenced(d[j], true);
      std::memcpy(&m.accumulators[i].values[j * LANES], w.row(d[j]), LANES * 4);
    }
  }
  Accumulators& sums = m.accumulators[product.accumulators];
  sums.pending++;
  w.products++;
  for (int j = 0; j < num; j++) w.tags[d[j]] = TAG_PENDING | u32(product.accumulators) << 8 | j;
  for (int j = 0; j < num_a; j++) w.operand[a[j]] = w.products;
  // It may be computed at once if all before it are. Registers get the sums when they are waited for all the same.
  bool first = true;
  for (const auto& group : w.product_groups)
    for (const Product& before : group) first &= before.done;
  for (const Product& before : w.open_products) first &= before.done;
  if (first && m.now()) m.finish(w, product), product.done = true;
  w.open_products.push_back(std::move(product));
}

inline void wgmma_fence(Machine&, Warp& w, const Instruction&, u32) { w.fences++; }

inline void wgmma_commit(Machine& m, Warp& w, const Instruction&, u32) {
  w.product_groups.push_back(std::move(w.open_products));
  w.open_products.clear();
}

// m: groups that may be in flight
inline void wgmma_wait(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  if (aligned(m, w, mask)) m.finish_products(w, in.m[0]);
}

// ---- Data Movement and Conversion Instructions: cp.async
// operands: target, source, bytes to read or -1; m: offsets, bytes

inline void cp_async(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  if (m.launch.counts) {
    auto source = [&](int lane) { return wide(w, o[1], lane) + in.m[1]; };
    auto target = [&](int lane) { return w.row(o[0])[lane] + in.m[0]; };
    auto read = [&](int lane) { return o[2] < 0 ? u32(in.m[2]) : std::min(u32(in.m[2]), w.row(o[2])[lane]); };
    m.count_global(w.pc, mask, source, read, true, false);
    m.count_shared(w.pc, LANES, mask, target, in.m[2]);
  }
  each(mask, [&](int lane) {
    CopyAsync copy{
        u32(w.row(o[0])[lane] + in.m[0]), wide(w, o[1], lane) + in.m[1], u32(in.m[2]), u32(in.m[2]), w.pc, lane};
    if (o[2] >= 0) copy.read = std::min(copy.read, w.row(o[2])[lane]);
    if (!m.shared_range(w, w.pc, lane, copy.target, copy.bytes, copy.bytes)) return;
    if (copy.source % copy.bytes && copy.read)
      return m.report(MISALIGNED, w.pc, w.id, lane, copy.source, -1, "%u bytes", copy.bytes);
    m.start_flight(w, w.pc, lane, copy.target - SHARED_BASE, copy.bytes);
    // In flight until it is waited for, even if the data come at once.
    if (m.now() && copy.read)
      if (u8* source = m.global(w, {w.pc, lane, copy.source, copy.read, Machine::LOAD}))
        std::memcpy(&m.shared[copy.target - SHARED_BASE], source, copy.read);
    w.open_copies.push_back(copy);
  });
}

inline void cp_commit(Machine&, Warp& w, const Instruction&, u32) {
  w.copies.push_back(std::move(w.open_copies));
  w.open_copies.clear();
}

// m: groups that may be in flight, -1: all copies must be over
inline void cp_wait(Machine& m, Warp& w, const Instruction& in, u32) {
  if (in.m[0] < 0 && !w.open_copies.empty()) cp_commit(m, w, in, 0);
  while (int(w.copies.size()) > std::max(in.m[0], 0)) {
    for (const CopyAsync& copy : w.copies.front()) m.finish(w, copy);
    w.copies.pop_front();
  }
}

// ---- Parallel Synchronization and Communication Instructions: mbarrier
// operands: address, count or -1, bytes or -1, phase or -1; m: offset, result predicate

inline u32 mbarrier_address(Machine& m, Warp& w, const Instruction& in, int lane) {
  return w.row(operands(m, in)[0])[lane] + in.m[0];
}

inline void mbarrier_init(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  each(mask, [&](int lane) {
    u32 at = mbarrier_address(m, w, in, lane);
    if (!m.shared_range(w, w.pc, lane, at, 8, 8)) return;
    u64 pattern = m.random() | u64(m.random()) << 32;  // opaque, so that it counts as a write of something new
    m.write_shared(w, w.pc, lane, at - SHARED_BASE, 8, (const u8*)&pattern);
    auto [found, is_new] = m.mbarriers.try_emplace(at);
    Mbarrier& b = found->second;
    if (b.live)
      m.report(BARRIER, w.pc, w.id, lane, at - SHARED_BASE, b.pc, "mbarrier at shared address %u is initialized again",
               at - SHARED_BASE);
    int agent = is_new ? m.num_agents++ : b.agent;
    if (agent >= MAX_AGENTS) {
      m.report(UNSUPPORTED, w.pc, w.id, lane, 0, -1, "more than %d mbarriers", MAX_AGENTS - m.num_warps);
      m.stopped = true;
      return;
    }
    u32 copies = b.copies;
    b = Mbarrier();
    b.live = true, b.agent = agent, b.copies = copies, b.pc = w.pc;
    b.expected = b.pending = w.row(operands(m, in)[1])[lane];
  });
}

inline void mbarrier_inval(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  each(mask, [&](int lane) {
    u32 at = mbarrier_address(m, w, in, lane);
    Mbarrier* b = m.mbarrier(w, w.pc, lane, at);
    if (!b) return;
    if (b->bytes || b->pending != b->expected)
      m.report(BARRIER, w.pc, w.id, lane, at - SHARED_BASE, b->pc,
               "mbarrier at shared address %u ends with %d arrivals and %lld bytes outstanding", at - SHARED_BASE,
               b->pending, (long long)b->bytes);
    b->live = false;
    u64 pattern = m.random() | u64(m.random()) << 32;
    m.write_shared(w, w.pc, lane, at - SHARED_BASE, 8, (const u8*)&pattern);
    m.forget(at - SHARED_BASE, 8);
  });
}

inline void mbarrier_arrive(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  const Clock known = w.known_to(mask);
  each(mask, [&](int lane) {
    u32 at = mbarrier_address(m, w, in, lane);
    Mbarrier* b = m.mbarrier(w, w.pc, lane, at);
    if (!b) return;
    if (o[2] >= 0) b->bytes += w.row(o[2])[lane];
    if (in.m[2]) {  // arrives; else it expects bytes only
      b->arriving.join(known), b->arriving_fenced.join(w.fenced);
      b->pending -= o[1] >= 0 ? w.row(o[1])[lane] : 1;
      if (b->pending < 0)
        m.report(BARRIER, w.pc, w.id, lane, at - SHARED_BASE, b->pc,
                 "more arrivals than the %d of mbarrier at shared address %u", b->expected, at - SHARED_BASE);
    }
    m.complete_phase(*b);
  });
  if (in.m[2]) w.clock.at[w.id]++;
}

inline void mbarrier_try_wait(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  u32 over = 0, lanes_until = ~0u;  // up to when the warp's own accesses are known to all lanes
  w.polled = -1, w.polled_pc = w.pc;
  each(mask, [&](int lane) {
    u32 at = mbarrier_address(m, w, in, lane);
    Mbarrier* b = m.mbarrier(w, w.pc, lane, at);
    u32 parity = w.row(o[3])[lane] & 1;
    if (b && (b->phase & 1) == parity) {
      w.polled = at, w.polled_parity = parity;
      return;
    }
    over |= 1u << lane;
    if (b) {
      u32 own = w.clock.at[w.id];
      w.clock.join(b->done), w.fenced.join(b->done_fenced);
      w.clock.at[w.id] = own;
      lanes_until = std::min(lanes_until, b->done.at[w.id]);
    }
  });
  if (over == w.alive) w.lanes_synchronized = std::max(w.lanes_synchronized, lanes_until + 1);
  set_predicate(w, in.m[1], mask, over);
  if (w.polled < 0) {
    w.polls = 0;
    m.progress = true;
    return;
  }
  if (w.polls++) m.finish_load_for(w.polled);
  m.yielded = true;
}

// What is left of a wait that was removed: it says that the phase is over. m: as above
inline void mbarrier_not_waited(Machine&, Warp& w, const Instruction& in, u32 mask) {
  set_predicate(w, in.m[1], mask, ALL_LANES);
}

// ---- Data Movement and Conversion Instructions: cp.async.bulk.tensor
// operands: shared address, tensor map, mbarrier or -1, coordinates; m: adds, offset

inline void tensor_copy(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  const bool loads = o[2] >= 0;
  each(mask, [&](int lane) {
    TensorCopy copy{&in,
                    w.pc,
                    w.id,
                    lane,
                    wide(w, o[1], lane),
                    {},
                    u32(w.row(o[0])[lane] + in.m[1]),
                    loads ? w.row(o[2])[lane] : 0,
                    m.time,
                    w.clock};
    for (int i = 3; i < in.count; i++) copy.at[i - 3] = s32(w.row(o[i])[lane]);
    const TensorMap* map = (const TensorMap*)m.global(w, {w.pc, lane, copy.map, sizeof(TensorMap), Machine::LOAD});
    if (!map) return;
    if (map->magic != TENSOR_MAP_MAGIC)
      return m.report(TENSOR_MAP, w.pc, w.id, lane, copy.map, -1, "no tensor map there");
    if (map->rank != in.count - 3)
      return m.report(TENSOR_MAP, w.pc, w.id, lane, copy.map, -1, "%d coordinates for a tensor of %d dimensions",
                      in.count - 3, map->rank);
    if (u64(map->box[0]) * TENSOR_MAP_BYTES[map->type & 15] > 1024)
      return m.report(TENSOR_MAP, w.pc, w.id, lane, copy.map, -1, "rows of more than 1024 bytes");
    u32 bytes = box_bytes(*map), alignment = 128u << map->swizzle;
    if (!m.shared_range(w, w.pc, lane, copy.shared, bytes, alignment)) return;
    if (m.launch.counts) {
      Request request;
      const u32 size = TENSOR_MAP_BYTES[map->type & 15];
      rows_of_box(*map, copy.at, [&](u32, u64 address, u32 first, u32 last) {
        if (first == last) return;
        request.add(address, (last - first) * size);
        m.touch(address, (last - first) * size, loads || in.m[0], !loads);
      });
      request.count(m.launch.counts[w.pc]);
    }
    if (!loads) {
      if (m.now()) m.finish_store(w, copy), copy.done = true;
      w.open_stores.push_back(copy);
      return;
    }
    m.start_flight(w, w.pc, lane, copy.shared - SHARED_BASE, bytes);
    if (m.now())
      m.finish_load(copy);
    else
      m.loads.push_back(copy);
  });
}

inline void bulk_commit(Machine& m, Warp& w, const Instruction&, u32) {
  w.stores.push_back(std::move(w.open_stores));
  w.open_stores.clear();
}

// m: groups that may be in flight
inline void bulk_wait(Machine& m, Warp& w, const Instruction& in, u32) {
  while (int(w.stores.size()) > in.m[0]) {
    for (const TensorCopy& copy : w.stores.front())
      if (!copy.done) m.finish_store(w, copy);
    w.stores.pop_front();
  }
}

// ---- Data Movement and Conversion Instructions: tensormap.replace
// operands: address, value; m: offset, shared, 64-bit address, field, index, value if there is no operand, 64-bit value
// Parallel Synchronization and Communication Instructions: tensormap.cp_fenceproxy
// operands: global and shared address

inline void tensormap_replace(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  int lane = only_lane(mask);
  u64 at = address(w, o[0], lane, in.m[0], in.m[2]);
  u64 value = in.count < 2 ? in.m[5] : in.m[6] ? wide(w, o[1], lane) : w.row(o[1])[lane];
  u8* place;
  if (in.m[1]) {
    if (!m.shared_range(w, w.pc, lane, at, sizeof(TensorMap), 64)) return;
    place = &m.shared[at - SHARED_BASE];
    m.mark_written(at - SHARED_BASE, 128, w.id, w.clock.at[w.id], w.pc, true, 1u << lane);
  } else if (!(place = m.global(w, {w.pc, lane, at, sizeof(TensorMap), Machine::STORE}))) {
    return;
  }
  TensorMap& map = *(TensorMap*)place;
  // Numbers of element types in PTX: as of the driver, but f32.ftz, f64, bf16 come in this order.
  static const u8 TYPES[] = {TM_U8,  TM_U16,     TM_U32, TM_S32,  TM_U64,  TM_S64, TM_F16,
                             TM_F32, TM_F32_FTZ, TM_F64, TM_BF16, TM_TF32, TM_TF32};
  map.magic = TENSOR_MAP_MAGIC;
  switch (in.m[3]) {
    case 0:
      map.base = value;
      break;
    case 1:
      map.rank = value + 1;
      break;
    case 2:
      map.box[in.m[4]] = value;
      break;
    case 3:
      map.dim[in.m[4]] = value;
      break;
    case 4:
      map.stride[in.m[4]] = value;
      break;
    case 5:
      if (value != 1) m.report(UNSUPPORTED, w.pc, w.id, lane, 0, -1, "element strides other than 1");
      break;
    case 6:
      if (value < sizeof TYPES)
        map.type = TYPES[value];
      else
        m.report(UNSUPPORTED, w.pc, w.id, lane, 0, -1, "elements of type %d", int(value));
      break;
    case 7:
      if (value) m.report(UNSUPPORTED, w.pc, w.id, lane, 0, -1, "interleaved layouts");
      break;
    case 8:
      map.swizzle = value;
      break;
    case 9:
      map.nan_fill = value;
      break;
  }
}

inline void tensormap_copy(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  int lane = only_lane(mask);
  u32 from = w.row(o[1])[lane];
  if (!m.shared_range(w, w.pc, lane, from, 128, 128)) return;
  u8* to = m.global(w, {w.pc, lane, wide(w, o[0], lane), 128, Machine::STORE});
  if (to) std::memcpy(to, &m.shared[from - SHARED_BASE], 128);
}

// ---- Among the lanes of a warp
// Parallel Synchronization and Communication Instructions: bar.warp.sync, which alone orders their accesses to memory,
// elect.sync, activemask, vote.sync, redux.sync; Data Movement and Conversion Instructions: shfl.sync

// .sync: the lanes that its operand names and that have not ended execute it together; those of them that do.
inline u32 members(Machine& m, Warp& w, int row, u32 mask) {
  u32 named = w.row(row)[only_lane(mask)] & w.alive;
  if (named != mask)
    m.report(DIVERGENCE, w.pc, w.id, only_lane(named ^ mask), 0, -1, "it is for lanes %08x, lanes %08x execute it",
             named, mask);
  return named & mask;
}

// operand: members
inline void warp_sync(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const int row = operands(m, in)[0];
  const u32 named = w.row(row)[only_lane(mask)] & w.alive;
  if (members(m, w, row, mask) == w.alive)
    w.synchronize_lanes();
  else if (named != w.alive)
    m.report(UNSUPPORTED, w.pc, w.id, only_lane(mask), 0, -1, "bar.warp.sync of lanes %08x alone", named);
}

// operands: leader's lane or -1, members; m: result predicate
inline void elect(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  int leader = only_lane(members(m, w, o[1], mask));
  set_predicate(w, in.m[0], mask, 1u << leader);
  if (o[0] >= 0) each(mask, [&](int lane) { set(w, o[0], mask, lane, leader); });
}

inline void activemask(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  each(mask, [&](int lane) { set(w, operands(m, in)[0], mask, lane, mask); });
}

// operands: result, value, lane, clamp, members; m: 0 up, 1 down, 2 butterfly, 3 index; predicate or -1
inline void shfl(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  members(m, w, o[4], mask);
  u32 values[LANES], valid = 0;
  std::memcpy(values, w.row(o[1]), sizeof values);
  u32 results[LANES];
  for (int lane = 0; lane < LANES; lane++) {
    int by = w.row(o[2])[lane] & 31, clamp = w.row(o[3])[lane] & 31, segment = w.row(o[3])[lane] >> 8 & 31;
    int last = (lane & segment) | (clamp & ~segment), source;
    bool inside;
    switch (in.m[0]) {
      case 0:
        source = lane - by, inside = source >= last;
        break;
      case 1:
        source = lane + by, inside = source <= last;
        break;
      case 2:
        source = lane ^ by, inside = source <= last;
        break;
      default:
        source = (lane & segment) | (by & ~segment), inside = source <= last;
    }
    results[lane] = values[inside ? source : lane];
    valid |= u32(inside) << lane;
  }
  each(mask, [&](int lane) { set(w, o[0], mask, lane, results[lane]); });
  if (in.m[1] >= 0) set_predicate(w, in.m[1], mask, valid);
}

// operands: members, result; m: 0 ballot, 1 any, 2 all; result predicate, source predicate, negated
inline void vote(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  u32 voters = members(m, w, o[0], mask);
  u32 votes = (in.m[3] ? ~w.predicates[in.m[2]] : w.predicates[in.m[2]]) & voters;
  if (in.m[0] == 0)
    each(mask, [&](int lane) { set(w, o[1], mask, lane, votes); });
  else
    set_predicate(w, in.m[1], mask, (in.m[0] == 1 ? votes != 0 : votes == voters) ? ALL_LANES : 0);
}

// operands: result, value, members; m: an Operation, signed
inline void redux(Machine& m, Warp& w, const Instruction& in, u32 mask) {
  const s32* o = operands(m, in);
  u32 reduced = members(m, w, o[2], mask);
  int first = only_lane(reduced);
  u64 result = w.row(o[1])[first];
  each(reduced & ~(1u << first),
       [&](int lane) { result = combine(in.m[0], in.m[1] ? T_SIGNED : T_UNSIGNED, 4, result, w.row(o[1])[lane], 0); });
  each(mask, [&](int lane) { set(w, o[0], mask, lane, result); });
}

inline const Entry TABLE[] = {
    {"@bra", "*", bra},
    {"@brx", "*", brx},
    {"@ret", "*", ret},
    {"@trap", "*", trap},
    {"@nothing", "*", nothing},
    {"@bar", "*", bar},
    {"@membar", "*", membar},
    {"@fence_proxy_async", "*", fence_proxy_async},
    {"@ld", "*", ld},
    {"@st", "*", st, ROWS},
    {"@st_global", "*", st, NOTHING},
    {"@extended", "*", extended},
    {"@atom", "*", atom},
    {"@matrix", "*", matrix},
    {"@mma", "*", mma},
    {"@wgmma", "*", wgmma},
    {"@wgmma_fence", "*", wgmma_fence},
    {"@wgmma_commit", "*", wgmma_commit},
    {"@wgmma_wait", "*", wgmma_wait},
    {"@cp_async", "*", cp_async},
    {"@cp_commit", "*", cp_commit},
    {"@cp_wait", "*", cp_wait},
    {"@mbarrier_init", "*", mbarrier_init},
    {"@mbarrier_inval", "*", mbarrier_inval},
    {"@mbarrier_arrive", "*", mbarrier_arrive},
    {"@mbarrier_try_wait", "*", mbarrier_try_wait},
    {"@mbarrier_not_waited", "*", mbarrier_not_waited},
    {"@tensor_copy", "*", tensor_copy},
    {"@bulk_commit", "*", bulk_commit},
    {"@bulk_wait", "*", bulk_wait},
    {"@tensormap_replace", "*", tensormap_replace},
    {"@tensormap_copy", "*", tensormap_copy},
    {"@warp_sync", "*", warp_sync},
    {"@elect", "*", elect},
    {"@activemask", "*", activemask},
    {"@shfl", "*", shfl},
    {"@vote", "*", vote},
    {"@redux", "*", redux},
};
}  // namespace instructions
