// Asynchronous work: what happens when it happens, between its issue and its wait.
#pragma once
#include "memory.h"

// ---- Data Movement and Conversion Instructions: cp.async

inline void Machine::finish(Warp& w, const CopyAsync& copy) {
  u32 offset = copy.target - SHARED_BASE;
  end_flight(offset, copy.bytes);
  std::memset(&shared[offset], 0, copy.bytes);
  if (copy.read)
    if (u8* source = global(w, {copy.pc, copy.lane, copy.source, copy.read, LOAD}))
      std::memcpy(&shared[offset], source, copy.read);
  mark_written(offset, copy.bytes, w.id, w.clock.at[w.id], copy.pc, true, 1u << copy.lane);
  w.last_access[copy.lane] = w.clock.at[w.id];
}

// ---- Data Movement and Conversion Instructions: cp.async.bulk.tensor; Tensors, tiled mode

// The swizzle: which 16 bytes of a row change places; `mode` 1, 2, 3 for rows of 32, 64, 128 bytes.
inline u32 swizzled(u32 address, int mode) {
  return mode ? address ^ ((address >> 7 & ((1u << mode) - 1)) << 4) : address;
}

inline u32 box_bytes(const TensorMap& map) {
  u32 bytes = TENSOR_MAP_BYTES[map.type & 15];
  for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// Calls row(place of the row in the box, address of its first element that is inside, first and last + 1 inside).
template <class Row>
void rows_of_box(const TensorMap& map, const std::array<s32, 5>& at, Row row) {
  u32 size = TENSOR_MAP_BYTES[map.type & 15], rows = box_bytes(map) / (size * map.box[0]);
  u32 index[5] = {};
  for (u32 r = 0; r < rows; r++) {
    u64 address = map.base;
    bool inside = true;
    for (int i = 1; i < map.rank; i++) {
      s64 coordinate = s64(at[i]) + index[i];
      inside &= coordinate >= 0 && coordinate < map.dim[i];
      address += u64(coordinate) * map.stride[i - 1];
    }
    s64 first = std::clamp<s64>(-s64(at[0]), 0, map.box[0]),
        last = std::clamp<s64>(s64(map.dim[0]) - at[0], first, map.box[0]);
    if (!inside) first = last = 0;
    row(r * map.box[0] * size, address + u64((at[0] + first) * size), u32(first), u32(last));
    for (int i = 1; i < map.rank && ++index[i] == map.box[i]; i++) index[i] = 0;
  }
}

// The bytes of a box lie one after another, each 16 of them where the swizzle has them: f(offset in shared, done,
// bytes).
template <class Piece>
void pieces_of_row(const TensorMap& map, u32 shared, u32 place, Piece piece) {
  u32 bytes = map.box[0] * TENSOR_MAP_BYTES[map.type & 15];
  for (u32 done = 0; done < bytes; done += 16)
    piece(swizzled(shared + place + done, map.swizzle) - SHARED_BASE, done, std::min(16u, bytes - done));
}

inline void Machine::finish_load(const TensorCopy& copy) {
  Warp& w = warps[copy.warp];
  const TensorMap& map = *(const TensorMap*)copy.map;
  Mbarrier* b = mbarrier(w, copy.pc, copy.lane, copy.mbarrier);
  int agent = b ? b->agent : copy.warp;
  u32 clock = b ? ++b->copies : 0, size = TENSOR_MAP_BYTES[map.type & 15], bytes = box_bytes(map);
  const u32 issued = copy.clock.at[copy.warp];  // who waits for the copy knows of the warp up to then
  end_flight(copy.shared - SHARED_BASE, bytes);
  rows_of_box(map, copy.at, [&](u32 place, u64 address, u32 first, u32 last) {
    u8 row[1024];
    std::memset(row, map.nan_fill ? 0xff : 0, sizeof row);
    if (first < last)
      if (u8* source = global(w, {copy.pc, copy.lane, address, (last - first) * size, LOAD, nullptr, issued}))
        std::memcpy(row + first * size, source, (last - first) * size);
    pieces_of_row(map, copy.shared, place, [&](u32 offset, u32 done, u32 count) {
      std::memcpy(&shared[offset], row + done, count);
      mark_written(offset, count, agent, clock, copy.pc, false, 1u << copy.lane);
    });
  });
  progress = true;
  if (!b) return;
  Clock seen = copy.clock;
  seen.at[agent] = clock;
  b->arriving.join(seen);
  b->bytes -= bytes;
  complete_phase(*b);
}

inline void Machine::finish_load_for(u32 address) {
  for (size_t i = 0; i < loads.size(); i++)
    if (loads[i].mbarrier == address) {
      TensorCopy copy = loads[i];
      loads.erase(loads.begin() + i);
      return finish_load(copy);
    }
}

inline void Machine::finish_store(Warp& w, const TensorCopy& copy) {
  const TensorMap& map = *(const TensorMap*)copy.map;
  bool adds = copy.in->m[0];
  u32 size = TENSOR_MAP_BYTES[map.type & 15];
  rows_of_box(map, copy.at, [&](u32 place, u64 address, u32 first, u32 last) {
    u8 row[1024];
    pieces_of_row(map, copy.shared, place, [&](u32 offset, u32 done, u32 count) {
      read_shared_async(w, copy.pc, copy.lane, offset, count, copy.issued);
      std::memcpy(row + done, &shared[offset], count);
    });
    if (first == last) return;
    u8* target = global(w, {copy.pc, copy.lane, address, (last - first) * size, adds ? ATOMIC : STORE});
    if (!target) return;
    const u8* source = row + first * size;
    if (!adds) {
      std::memcpy(target, source, (last - first) * size);
      return;
    }
    auto add = [&](auto kind) {
      for (u32 i = 0; i < last - first; i++) {
        decltype(kind) a, b;
        std::memcpy(&a, target + i * size, size), std::memcpy(&b, source + i * size, size);
        a = decltype(kind)(a + b);
        std::memcpy(target + i * size, &a, size);
      }
    };
    if (map.type == TM_F32 || map.type == TM_F32_FTZ)
      add(f32{});
    else if (map.type == TM_F16)
      add(f16{});
    else if (map.type == TM_BF16)
      add(bf16{});
    else if (size == 4)
      add(u32{});
    else
      report(UNSUPPORTED, copy.pc, w.id, copy.lane, 0, -1, "reduction of tensor map type %d", map.type);
  });
}

// ---- Asynchronous Multiply-and-Accumulate Instruction: wgmma.mma_async. A warp has 16 of the 64 rows.

// The type of the elements, as opcodes.py numbers them, and what their products are added up in: one number a register,
// or two of f16. Products of integers are exact in f32.
enum Element { E_F16, E_BF16, E_TF32, E_E4M3, E_E5M2, E_S8, E_U8 };
enum Sums { S_F32, S_F16, S_S32, S_S32_SATURATED };
inline int element_bytes(int type) { return type <= E_BF16 ? 2 : type == E_TF32 ? 4 : 1; }

inline f32 element(int type, u32 pattern) {
  switch (type) {
    case E_F16:
      return f16::of(pattern);
    case E_BF16:
      return bf16::of(pattern);
    case E_TF32:
      return from_bits(pattern & ~0x1fffu);
    case E_E4M3:
      return e4m3_to_f32(pattern);
    case E_E5M2:
      return e5m2_to_f32(pattern);
    case E_S8:
      return s8(pattern);
    default:
      return u8(pattern);
  }
}

// The elements in 16 bytes.
inline void elements(int type, const u8* from, f32* to) {
  auto each = [&](auto pattern, auto value) {
    for (u32 i = 0; i < 16 / sizeof pattern; i++) {
      std::memcpy(&pattern, from + i * sizeof pattern, sizeof pattern);
      to[i] = value(pattern);
    }
  };
  if (type == E_BF16)
    each(u16(), [](u16 x) -> f32 { return bf16::of(x); });
  else if (type == E_F16)
    each(u16(), [](u16 x) -> f32 { return f16::of(x); });
  else if (type == E_TF32)
    each(u32(), [](u32 x) { return element(E_TF32, x); });
  else
    each(u8(), [&](u8 x) { return element(type, x); });
}

// c += a b for m16: products of a row are added in the order of k, eight columns at a time.
template <int columns_of_b>
void add_products(const f32 (*a)[32], const f32 (*b)[columns_of_b], f32 (*c)[columns_of_b], int depth, int columns) {
  for (int i = 0; i < 16; i++)
    for (int n = 0; n < columns; n += 8) {
      f32 sums[8];
      std::memcpy(sums, &c[i][n], sizeof sums);
      for (int k = 0; k < depth; k++)
        for (int e = 0; e < 8; e++) sums[e] += a[i][k] * b[k][n + e];
      std::memcpy(&c[i][n], sums, sizeof sums);
    }
}

// Shared Memory Matrix Layout, Matrix Descriptor Format: where an operand in shared memory has its elements.
struct MatrixDescriptor {
  u32 start, leading, stride;
  int swizzle;
  explicit MatrixDescriptor(u64 d)
      : start(u32(d & 0x3fff) << 4), leading(u32(d >> 16 & 0x3fff) << 4), stride(u32(d >> 32 & 0x3fff) << 4) {
    int field = d >> 62;  // 1, 2, 3: 128, 64, 32 bytes
    swizzle = field ? 4 - field : 0;
  }
  // Address of element (i of the rows or columns, k) in elements of `bytes`; `transposed`: i is contiguous.
  u32 address(int i, int k, int bytes, bool transposed) const {
    int row = 16 << swizzle;  // bytes of a row of a core matrix, of 8 rows
    u32 offset;
    if (!transposed) {
      int in_row = k * bytes;
      offset = swizzle ? (i & 7) * row + (i >> 3) * stride + in_row
                       : (i & 7) * 16 + (i >> 3) * stride + (in_row >> 4) * leading + (in_row & 15);
    } else {
      int width = row / bytes;
      offset = swizzle ? i / width * leading + i % width * bytes + (k & 7) * row + (k >> 3) * stride
                       : i / width * stride + i % width * bytes + (k & 7) * 16 + (k >> 3) * leading;
    }
    return swizzled(start + offset, swizzle);
  }
};

// Lane and register of an accumulator <-> row and column: Register Fragments, figure of D; also of mma's C and D.
inline int fragment_row(int lane, int j) { return lane / 4 + (j >> 1 & 1) * 8; }
inline int fragment_column(int lane, int j) { return (j >> 2) * 8 + lane % 4 * 2 + (j & 1); }

// The accumulators in registers(j), and the sums of products and them (for integers, of products alone).
template <int columns, class Registers>
void load_sums(int kind, int count, Registers registers, f32 (*c)[columns]) {
  for (int j = 0; j < count / 2; j++)
    for (int lane = 0; lane < LANES; lane++) {
      u32 pattern = registers(kind == S_F16 ? j / 2 : j)[lane];
      f32 half = f16::of(pattern >> 16 * (j & 1) & 0xffff);
      f32& sum = c[fragment_row(lane, j)][fragment_column(lane, j)];
      sum = kind == S_F32 ? from_bits(pattern) : kind == S_F16 ? half : 0;
    }
}

template <int columns, class Registers, class Results>
void store_sums(int kind, int count, f32 (*c)[columns], Registers registers, Results results) {
  for (int j = 0; j < count / 2; j++)
    for (int lane = 0; lane < LANES; lane++) {
      f32 sum = c[fragment_row(lane, j)][fragment_column(lane, j)];
      u32& result = results(kind == S_F16 ? j / 2 : j)[lane];
      if (kind == S_F32) {
        result = bits(sum);
      } else if (kind == S_F16) {
        u32 half = f16(sum).pattern;
        result = j & 1 ? (result & 0xffff) | half << 16 : half;
      } else {
        s64 total = s64(sum) + s32(registers(j)[lane]);
        result = u32(kind == S_S32_SATURATED ? std::clamp<s64>(total, INT32_MIN, INT32_MAX) : total);
      }
    }
}

// Elements of A in registers, of 16 rows: those of mma and of wgmma alike.
inline void unpack_a(int type, const u32* row, int j, f32 (*a)[32]) {
  int bytes = element_bytes(type), per = 4 / bytes;
  for (int lane = 0; lane < LANES; lane++)
    for (int e = 0; e < per; e++)
      a[lane / 4 + (j & 1) * 8][lane % 4 * per + (j >> 1) * 4 * per + e] = element(type, row[lane] >> 8 * bytes * e);
}

inline void Machine::finish(Warp& w, const Product& product) {
  const Instruction& in = *product.in;
  const int columns = in.m[0], type = in.m[1] & 255, sums = in.m[1] >> 8;
  const int bytes = element_bytes(type), depth = 32 / bytes;
  const bool a_shared = in.m[2], a_transposed = in.m[3], b_transposed = in.m[4];
  const f32 sign_a = in.m[5], sign_b = in.m[6];
  static thread_local struct { f32 a[16][32], b[32][256], c[16][256]; } tiles;
  auto& a = tiles.a;
  auto& b = tiles.b;
  auto& c = tiles.c;
  // Rows [first, last) of an operand in shared memory, 16 bytes at a time: set(i, k, value).
  auto read = [&](u64 descriptor, int first, int last, bool transposed, auto set) {
    MatrixDescriptor d(descriptor);
    int step = 16 / bytes;
    f32 values[16];
    for (int i = first; i < last; i += transposed ? step : 1)
      for (int k = 0; k < depth; k += transposed ? 1 : step) {
        u32 address = d.address(i, k, bytes, transposed);
        if (shared_range(w, product.pc, 0, address, 16, 16)) {
          read_shared_async(w, product.pc, -1, address - SHARED_BASE, 16, product.issued);
          elements(type, &shared[address - SHARED_BASE], values);
        } else {
          std::fill_n(values, step, NAN);
        }
        for (int e = 0; e < step; e++) set(transposed ? i + e : i, transposed ? k : k + e, values[e]);
      }
  };
  if (a_shared) {
    int row = (w.id & 3) * 16;
    read(product.a, row, row + 16, a_transposed, [&](int i, int k, f32 x) { a[i - row][k] = sign_a * x; });
  } else {
    for (int j = 0; j < 4; j++) unpack_a(type, &product.a_values[j * LANES], j, a);
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < depth; k++) a[i][k] *= sign_a;
  }
  read(product.b, 0, columns, b_transposed, [&](int i, int k, f32 x) { b[k][i] = sign_b * x; });
  std::vector<u32>& values = accumulators[product.accumulators].values;
  if (!product.add) std::fill(values.begin(), values.end(), 0);
  auto registers = [&](int j) { return &values[j * LANES]; };
  load_sums(sums, columns, registers, c);
  add_products(a, b, c, depth, columns);
  store_sums(sums, columns, c, registers, registers);
}

inline void Machine::finish_products(Warp& w, size_t groups_left) {
  while (w.product_groups.size() > groups_left) {
    auto group = std::move(w.product_groups.front());
    w.product_groups.pop_front();
    for (const Product& product : group) {
      if (!product.done) finish(w, product);
      w.products_done++;
    }
    for (const Product& product : group)
      if (--accumulators[product.accumulators].pending == 0) settle(w, product.accumulators);
  }
}

// No product adds to these any more: registers that stand for them, copies too, get their values.
inline void Machine::settle(Warp& w, int which) {
  u32 tag = TAG_PENDING | u32(which) << 8;
  for (int r = 0; r < launch.rows; r++)
    if ((w.tags[r] & ~255u) == tag) {
      std::memcpy(w.row(r), &accumulators[which].values[(w.tags[r] & 255) * LANES], LANES * 4);
      w.tags[r] = 0;
    }
}
