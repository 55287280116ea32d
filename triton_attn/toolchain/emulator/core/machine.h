// One program (CTA) of a launch at a time: its warps, its shared memory, what is known of the order of its accesses.
#pragma once
#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "numbers.h"
#include "states.h"
#include "tensor_map.h"

constexpr int LANES = 32;
constexpr u32 ALL_LANES = ~0u;
constexpr u32 SHARED_BASE = 1024;  // the address of a program's shared memory; what is below is nobody's

enum Fault {
  GLOBAL_BOUNDS,
  SHARED_BOUNDS,
  MISALIGNED,
  READ_ONLY,
  UNWRITTEN,
  IN_FLIGHT,
  RACE_READ_AFTER_WRITE,
  RACE_WRITE_AFTER_READ,
  RACE_WRITE_AFTER_WRITE,
  PROXY_FENCE,
  OVERWRITTEN,
  WGMMA_REGISTER,
  WGMMA_FENCE,
  TRANSACTION_BYTES,
  BARRIER,
  DEADLOCK,
  DIVERGENCE,
  TRAP,
  LIMIT,
  PROGRAM_RACE,
  TENSOR_MAP,
  UNSUPPORTED,
};

// ---- what Python hands over; __init__.py has the same fields in the same order

struct Instruction {
  s32 op;
  s32 guard;           // -1: none; 2 * predicate + 1 if it is negated
  s32 first, count;    // operands, in the pool
  s32 uses, num_uses;  // rows that are read as values, in the pool
  s32 defs, num_defs;  // rows that are written, in the pool
  s32 m[8];            // modifiers, each instruction's own
};

struct Region {  // global memory that the launch may touch
  u64 base, bytes;
  s32 writable, unused;
  const u8* reachable;  // by byte; null: all of it
};

struct Report {
  s32 kind, pc, warp, lane, cta, other_pc;
  u64 address;
  char detail[232];
};

struct Counts {  // of one instruction of the program; counts.py says what they are
  s64 lanes, bytes, sectors, least_sectors, wavefronts, least_wavefronts, flops;
};

enum Completion { EARLY, LATE, RANDOM };            // of asynchronous work
enum Order { ROUND_ROBIN, SHUFFLED, FIRST, LAST };  // of the warps

struct Launch {
  const Instruction* program;
  s32 length, rows, predicates;
  const s32* pool;
  const u32* constants;  // pairs: row, value
  s32 num_constants, num_special;
  const s32* special;  // pairs: row, number of the special register
  u8* params;
  s32 param_bytes, shared_bytes, threads, local_bytes;
  s32 grid[3], num_regions;
  const Region* regions;
  s32 completion, order;
  u64 seed;
  s64 limit;  // warp instructions of the launch
  Report* reports;
  s32 max_reports, first_cta, last_cta, unused2;
  s64* executed;   // by instruction
  Counts* counts;  // by instruction; null: nothing is counted
  s64* traffic;    // by region: sectors that are read, sectors that are written, each once
};

// ---- vector clocks: which accesses of the others a warp can rely on

constexpr int MAX_WARPS = 32, MAX_AGENTS = 128;  // the others are mbarriers: they stand for the copies they count

struct Clock {
  std::array<u32, MAX_AGENTS> at{};
  void join(const Clock& other) {
    for (int i = 0; i < MAX_AGENTS; i++) at[i] = std::max(at[i], other.at[i]);
  }
};

struct Cell {        // state of one byte of shared memory
  u32 clock = 0;     // of the writer
  u32 time = 0;      // of the write
  u32 lanes = 0;     // of the writer: those that wrote this value since its lanes last waited for each other
  s32 pc = 0;        // of the write
  u8 writer = 0;     // agent
  u8 in_flight = 0;  // asynchronous writes that are not known to be over
  bool written = false;
  bool generic = false;  // written by the generic proxy
  bool operator==(const Cell&) const = default;
};

struct Read {     // the last of a warp of one byte of shared memory
  u32 clock = 0;  // of the warp
  s32 pc = 0;
  u32 lanes = 0;  // those that read it since the warp's lanes last waited for each other
  bool operator==(const Read&) const = default;
};

// ---- asynchronous work

struct CopyAsync {  // cp.async of one lane
  u32 target;
  u64 source;
  u32 bytes, read;
  int pc, lane;
};

struct TensorCopy {  // cp.async.bulk.tensor
  const Instruction* in;
  int pc, warp, lane;
  u64 map;
  std::array<s32, 5> at{};
  u32 shared, mbarrier;
  u32 issued;
  Clock clock;
  bool done = false;
};

struct Accumulators {  // a tile that wgmma adds to; registers that hold it are tagged until it is waited for
  std::vector<u32> values;
  int pending = 0;
};

struct Product {  // wgmma.mma_async of one warp
  const Instruction* in;
  int pc;
  u64 a, b;
  std::vector<u32> a_values;
  int accumulators;
  bool add;
  u32 issued;
  bool done = false;  // computed; what waits for it may not know yet
};

struct Mbarrier {
  bool live = false;
  int expected = 0, pending = 0;
  s64 bytes = 0;
  u32 phase = 0;
  int agent = 0;
  u32 copies = 0;
  int pc = 0;
  Clock arriving, arriving_fenced, done, done_fenced;
};

struct Barrier {
  int arrived = 0, needed = 0;
  Clock clock, fenced;
  std::vector<int> waiting;
};

// Tag of a register: unwritten bytes were copied into it, or it stands for an accumulator in flight.
constexpr u32 TAG_UNWRITTEN = 0x80000000u, TAG_PENDING = 0x40000000u;

struct Warp {
  int id = 0, pc = 0;
  u32 alive = ALL_LANES, active = ALL_LANES;
  bool diverged = false;
  int lane_pc[LANES] = {};
  struct Join {
    int pc;
    u32 lanes;
  };
  std::vector<Join> joins;  // of the branches that parted lanes, the innermost last: there these lanes wait for all
  enum { RUNS, WAITS, DONE } state = RUNS;
  int barrier = -1;
  int polls = 0;
  s64 polled = -1;  // the mbarrier, if the last poll failed
  int polled_pc = 0;
  u32 polled_parity = 0;
  u64 strong_read = 0;  // address of the last one of global memory
  std::vector<u32> registers;  // rows of 32 lanes; a register of 64 bits is two rows
  std::vector<u32> predicates;
  std::vector<u8> local;     // of each lane, one after another
  u32 carry = 0;             // CC.CF, by lane
  std::vector<u32> tags;     // by row
  std::vector<u32> defined;  // by row: how many wgmma.fence came before it was written
  std::vector<u32> used;     // by row: how many came before it was read
  std::vector<u32> operand;  // by row: 1 + the number of the product in flight that reads it
  u32 fences = 1, products = 0, products_done = 0;
  Clock clock;   // what it has seen
  Clock fenced;  // what of it was made visible to the async proxy
  // Parallel Synchronization and Communication Instructions, bar.warp.sync: lanes are in no order until they wait for
  // each other, by it or by a barrier.
  u32 lanes_synchronized = 1;            // its own time since they last did
  std::array<u32, LANES> last_access{};  // of each lane to shared memory, in its own time
  std::vector<CopyAsync> open_copies;
  std::deque<std::vector<CopyAsync>> copies;
  std::vector<TensorCopy> open_stores;
  std::deque<std::vector<TensorCopy>> stores;
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> product_groups;

  u32* row(int r) { return &registers[size_t(r) * LANES]; }
  void synchronize_lanes() { lanes_synchronized = ++clock.at[id]; }
  // Whether the lanes have not waited for each other since an access of one of them.
  bool lanes_unordered(int agent, u32 then) const { return agent == id && then >= lanes_synchronized; }
  // What lanes make known to whom they signal: their own accesses, and those of the other lanes that they waited for.
  Clock known_to(u32 lanes) const {
    Clock known = clock;
    for (int lane = 0; lane < LANES; lane++)
      if (!(lanes >> lane & 1) && last_access[lane] >= lanes_synchronized) known.at[id] = lanes_synchronized - 1;
    return known;
  }
};

struct Machine {
  const Launch& launch;
  const int num_warps;
  std::vector<u8> shared;
  States<Cell> cells;
  std::vector<States<Read>> reads;  // by warp
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  std::map<u32, Mbarrier> mbarriers;
  std::vector<TensorCopy> loads;  // tensor copies to shared memory that are under way
  std::vector<Accumulators> accumulators;
  int num_agents = 0, cta = 0, num_reports = 0, next_pc = 0;
  u32 time = 0;
  s64 total = 0;
  u64 random_state = 0;
  bool progress = false, stopped = false, yielded = false;
  Region const* last_region = nullptr;
  std::set<std::pair<int, int>> reported;

  // Who wrote and read a byte of global memory last, by region, in pages that come with the first access. Programs are
  // stamps, a new one for each and for each release of it, with STRONG_BIT; a warp's clock has its number above. Lanes
  // are those of that warp since they last waited for each other.
  struct Owner {
    u32 writer, reader, written, read;
    s32 write_pc, read_pc;
    u32 write_lanes, read_lanes;
    bool operator==(const Owner&) const = default;
  };
  static constexpr u64 PAGE = 4096;
  std::vector<std::vector<std::unique_ptr<States<Owner>>>> owners;
  std::vector<std::vector<u8>> touched;  // by region and sector: 1 it was read, 2 written
  std::vector<int> stamp_cta{-1};
  std::vector<bool> stamp_seen{true};
  std::map<u64, std::vector<bool>> released;  // by address: stamps that who acquires it has seen
  std::map<u64, Clock> released_to_warps;     // of this program
  std::set<u64> observed;                     // addresses whose strong reads become acquires at the next fence
  bool global_fence = false;

  explicit Machine(const Launch& launch);
  void run(int cta);

  u32 random();
  bool now();  // whether asynchronous work that starts is done at once
  void report(Fault kind, int pc, int warp, int lane, u64 address, int other_pc, const char* format, ...)
      __attribute__((format(printf, 8, 9)));

  // memory.h
  // Memory Consistency Model, Strong Operations: volatile, relaxed, acquire, release and atomic ones, of which two do
  // not race.
  enum Access { LOAD, STORE, STRONG_LOAD, STRONG_STORE, ATOMIC };
  static bool reads_only(Access access) { return access == LOAD || access == STRONG_LOAD; }
  struct GlobalAccess {
    int pc, lane;
    u64 address;
    u32 bytes;
    Access kind;
    const u8* stored = nullptr;  // what a store is about to write, where it is known
    u32 issued = 0;              // in the time of the warp; 0: now
  };
  u8* global(Warp& w, const GlobalAccess& access);
  void global_order(const Region& r, Warp& w, const GlobalAccess& access);
  void acquire(Warp& w, u64 address);
  void release(Warp& w, u32 lanes, u64 address, bool is_store);
  u8* local(Warp& w, int pc, int lane, u64 address, u32 bytes);
  bool shared_range(Warp& w, int pc, int lane, u32 address, u32 bytes, u32 alignment);
  // Of one lane, or of the whole warp if `lane` is -1. The result is a mask of unwritten bytes.
  u32 order_read(const Warp& w, int pc, int lane, u32 offset, u32 bytes);
  void mark_read(Warp& w, int pc, int lane, u32 offset, u32 bytes);
  u32 read_shared(Warp& w, int pc, int lane, u32 offset, u32 bytes);
  void read_shared_async(Warp& w, int pc, int lane, u32 offset, u32 bytes, u32 issued);
  void order_after_writes(const Clock& seen, Warp& w, int pc, int lane, u32 offset, u32 bytes);
  void order_after_reads(const Clock& seen, Warp& w, int pc, int lane, u32 offset, u32 bytes);
  void order_write(const Clock& seen, Warp& w, int pc, int lane, u32 offset, u32 bytes);
  void write_shared(Warp& w, int pc, int lane, u32 offset, u32 bytes, const u8* data);
  void mark_written(u32 offset, u32 bytes, int agent, u32 clock, int pc, bool generic, u32 lanes);
  void forget(u32 offset, u32 bytes);
  void not_in_flight(Warp& w, int pc, int lane, u32 offset, u32 bytes, const char* what);
  void start_flight(Warp& w, int pc, int lane, u32 offset, u32 bytes);
  void end_flight(u32 offset, u32 bytes);

  // counting.h
  void touch(u64 address, u32 bytes, bool reads, bool writes);
  template <class At, class Bytes>
  void count_global(int pc, u32 mask, At at, Bytes bytes, bool reads, bool writes);
  template <class At>
  void count_shared(int pc, int accesses, u32 mask, At at, u32 bytes);
  void count_operand(int pc, u64 descriptor, int first, int last, int bytes, bool transposed);

  // asynchronous.h
  void finish(Warp& w, const CopyAsync& copy);
  void finish_load(const TensorCopy& copy);
  void finish_load_for(u32 mbarrier);
  void finish_store(Warp& w, const TensorCopy& copy);
  void finish(Warp& w, const Product& product);
  void finish_products(Warp& w, size_t groups_left);
  void settle(Warp& w, int accumulators);

  void arrive(Warp& w, int pc, int id, int needed, bool wait);
  void complete_phase(Mbarrier& b);
  Mbarrier* mbarrier(Warp& w, int pc, int lane, u32 address);
  void exit_warp(Warp& w);
  void explain_deadlock();
  void step(Warp& w);
  void choose_lanes(Warp& w);
  void track_registers(Warp& w, const Instruction& in, int pc);
};

inline int only_lane(u32 mask) { return mask ? std::countr_zero(mask) : 0; }

using Handler = void (*)(Machine&, Warp&, const Instruction&, u32 mask);

// What passes through an instruction that only moves bytes: unwritten ones, and whole accumulators in flight.
enum Moves { NOTHING, ROWS, LOW_HALF, HIGH_HALF, TWO_HALVES };

struct Entry {
  const char* spellings;  // of the PTX opcode, with spaces between
  const char* signature;  // the result, then the operands: p predicate, h 16 bits, r 32, d 64; "*": decoded by hand
  Handler handler;
  Moves moves;
};
