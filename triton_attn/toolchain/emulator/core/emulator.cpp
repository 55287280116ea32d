// The scheduler of a program's warps, and the functions that Python calls. launches.py fills in a Launch.
#include "arithmetic.h"
#include "instructions.h"

namespace {
const std::vector<Entry>& table() {
  static const std::vector<Entry> entries = [] {
    std::vector<Entry> all(std::begin(instructions::TABLE), std::end(instructions::TABLE));
    all.insert(all.end(), std::begin(arithmetic::TABLE), std::end(arithmetic::TABLE));
    return all;
  }();
  return entries;
}
}  // namespace

Machine::Machine(const Launch& launch)
    : launch(launch),
      num_warps((launch.threads + LANES - 1) / LANES),
      shared(launch.shared_bytes + 16),
      cells(launch.shared_bytes),
      reads(num_warps, States<Read>(launch.shared_bytes)),
      warps(num_warps),
      owners(launch.num_regions),
      touched(launch.num_regions) {}

u32 Machine::random() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return u32(random_state >> 16);
}

bool Machine::now() { return launch.completion == EARLY || (launch.completion == RANDOM && random() % 2); }

void Machine::report(Fault kind, int pc, int warp, int lane, u64 address, int other_pc, const char* format, ...) {
  if (!reported.insert({kind, pc}).second) return;
  if (num_reports >= launch.max_reports) return;
  Report& r = launch.reports[num_reports++];
  r = {kind, pc, warp, lane, cta, other_pc, address, ""};
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(r.detail, sizeof r.detail, format, arguments);
  va_end(arguments);
}

Mbarrier* Machine::mbarrier(Warp& w, int pc, int lane, u32 address) {
  auto found = mbarriers.find(address);
  if (found != mbarriers.end() && found->second.live) return &found->second;
  report(BARRIER, pc, w.id, lane, address, -1, "no mbarrier is initialized at shared address %d",
         int(address - SHARED_BASE));
  return nullptr;
}

// Phase Completion of the mbarrier object: a phase is over when nothing is pending, neither arrivals nor bytes.
void Machine::complete_phase(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase++;
  b.pending = b.expected;
  b.done.join(b.arriving), b.done_fenced.join(b.arriving_fenced);
  progress = true;
}

void Machine::arrive(Warp& w, int pc, int id, int needed, bool wait) {
  if (id < 0 || id > 15 || needed % LANES || needed <= 0) {
    report(BARRIER, pc, w.id, 0, id, -1, "barrier %d of %d threads", id, needed);
    return;
  }
  Barrier& b = barriers[id];
  if (!b.arrived)
    b.needed = needed, b.clock = Clock(), b.fenced = Clock();
  else if (b.needed != needed)
    report(BARRIER, pc, w.id, 0, id, -1, "barrier %d is for %d threads here, for %d elsewhere", id, needed, b.needed);
  b.clock.join(w.clock), b.fenced.join(w.fenced);
  w.clock.at[w.id]++;
  b.arrived += LANES;
  if (wait) {
    w.synchronize_lanes();
    w.state = Warp::WAITS, w.barrier = id, b.waiting.push_back(w.id), yielded = true;
  }
  if (b.arrived < b.needed) return;
  for (int k : b.waiting) {
    Warp& other = warps[k];
    other.state = Warp::RUNS, other.barrier = -1;
    u32 own = other.clock.at[k];
    other.clock.join(b.clock), other.fenced.join(b.fenced);
    other.clock.at[k] = own;
  }
  b.waiting.clear();
  b.arrived = 0;
  progress = true;
}

void Machine::exit_warp(Warp& w) {
  w.state = Warp::DONE;
  progress = yielded = true;
  if (!w.open_products.empty()) instructions::wgmma_commit(*this, w, {}, 0);
  finish_products(w, 0);
  w.copies.push_back(std::move(w.open_copies));
  for (auto& group : w.copies)
    for (auto& copy : group) finish(w, copy);
  w.stores.push_back(std::move(w.open_stores));
  for (auto& group : w.stores)
    for (auto& copy : group) {
      report(IN_FLIGHT, copy.pc, w.id, copy.lane, 0, -1, "the warp ends before it has waited for this copy to be read");
      if (!copy.done) finish_store(w, copy);
    }
  w.copies.clear(), w.stores.clear(), w.open_copies.clear(), w.open_stores.clear();
}

// What instructions do with registers that hold unwritten bytes or accumulators in flight, and what wgmma will ask for.
void Machine::track_registers(Warp& w, const Instruction& in, int pc) {
  const Entry& entry = table()[in.op];
  const s32 *uses = launch.pool + in.uses, *defs = launch.pool + in.defs;
  u32 passed[4] = {}, defined = 0;
  for (int i = 0; i < in.num_uses; i++) {
    u32 tag = w.tags[uses[i]];
    // What only moves was put there by a compiler that assigns registers.
    if (!(entry.moves == ROWS && in.num_defs)) w.used[uses[i]] = w.fences;
    if (!tag) continue;
    bool unwritten = tag & TAG_UNWRITTEN;
    if (entry.moves == ROWS && (i < 2 || !in.num_defs)) {
      if (in.num_defs) passed[i] = tag;
      if (in.num_defs || unwritten) continue;
    } else if (unwritten && entry.moves == LOW_HALF) {
      if (tag >> 24 & 3) passed[0] = tag & ~(12u << 24);
      continue;
    } else if (unwritten && entry.moves == HIGH_HALF) {
      if (tag >> 24 & 12) passed[0] = (tag & ~(15u << 24)) | (tag >> 26 & 3) << 24;
      continue;
    } else if (unwritten && entry.moves == TWO_HALVES) {
      passed[0] |= i ? (tag & ~(15u << 24)) | (tag >> 24 & 3) << 26 : tag;
      continue;
    }
    if (unwritten)
      report(UNWRITTEN, pc, w.id, 0, 0, s32(tag & 0xffffff),
             "it was loaded from shared memory that nobody has written");
    else
      report(WGMMA_REGISTER, pc, w.id, 0, 0, -1, "an accumulator of a wgmma that is not waited for");
    w.tags[uses[i]] = 0;
  }
  for (int i = 0; i < in.num_defs; i++) {
    int row = defs[i];
    if (w.operand[row] > w.products_done)
      report(OVERWRITTEN, pc, w.id, 0, 0, -1, "a register that a wgmma in flight reads");
    w.tags[row] = entry.moves == ROWS && in.num_defs == in.num_uses ? passed[i] : i == 0 ? passed[0] : 0;
    // A move keeps what it moves; a constant is new wherever it comes.
    defined = entry.moves == ROWS && in.num_defs == in.num_uses ? w.defined[uses[i]] : w.fences;
    w.defined[row] = defined == ~0u ? w.fences : defined;
  }
}

// Which lanes of a diverged warp go on: of those that the innermost branch has parted and that are not where they come
// together, the ones that are furthest behind. As they meet others, they go on together.
void Machine::choose_lanes(Warp& w) {
  const auto at = [&](u32 lanes, int pc) {
    u32 found = 0;
    instructions::each(lanes, [&](int lane) { found |= u32(w.lane_pc[lane] == pc) << lane; });
    return found;
  };
  u32 lanes = w.alive;
  for (; !w.joins.empty(); w.joins.pop_back()) {
    const auto& join = w.joins.back();
    lanes = join.lanes & w.alive & ~at(join.lanes, join.pc);
    if (lanes) break;
    lanes = w.alive;
  }
  w.pc = launch.length;
  instructions::each(lanes, [&](int lane) { w.pc = std::min(w.pc, w.lane_pc[lane]); });
  w.active = at(lanes, w.pc);
  w.diverged = w.active != w.alive;
  if (!w.diverged) w.joins.clear();
}

void Machine::step(Warp& w) {
  if (w.diverged) choose_lanes(w);
  const int pc = w.pc;
  const Instruction& in = launch.program[pc];
  u32 mask = w.active;
  if (in.guard >= 0) mask &= in.guard & 1 ? ~w.predicates[in.guard >> 1] : w.predicates[in.guard >> 1];
  time++, total++;
  next_pc = pc + 1;
  if (mask) {
    launch.executed[pc]++;
    if (launch.counts) launch.counts[pc].lanes += std::popcount(mask);
    track_registers(w, in, pc);
    table()[in.op].handler(*this, w, in, mask);
  }
  if (next_pc < 0) return;  // it has set the lanes' own
  if (w.diverged)
    instructions::each(w.active, [&](int lane) { w.lane_pc[lane] = next_pc; });
  else
    w.pc = next_pc;
}

void Machine::explain_deadlock() {
  for (Warp& w : warps) {
    if (w.state == Warp::WAITS) {
      const Barrier& b = barriers[w.barrier];
      report(DEADLOCK, w.pc - 1, w.id, 0, w.barrier, -1, "waits at barrier %d, where %d of %d threads are", w.barrier,
             b.arrived, b.needed);
    } else if (w.state == Warp::RUNS && w.polled >= 0) {
      const Mbarrier& b = mbarriers[u32(w.polled)];
      report(b.bytes ? TRANSACTION_BYTES : DEADLOCK, w.polled_pc, w.id, 0, w.polled - SHARED_BASE, b.pc,
             "waits for the phase of parity %u of the mbarrier at shared address %d: phase %u lacks %d arrivals and "
             "%lld bytes",
             w.polled_parity, int(w.polled - SHARED_BASE), b.phase, b.pending, (long long)b.bytes);
    } else if (w.state == Warp::RUNS) {
      report(DEADLOCK, w.pc, w.id, 0, 0, -1, "goes on, but nothing changes");
    }
  }
}

void Machine::run(int number) {
  cta = number;
  random_state = launch.seed * 0x9E3779B97F4A7C15ull + u64(cta) * 0xD1B54A32D192ED03ull + 88172645463325252ull;
  cells.clear();
  for (auto& of_warp : reads) of_warp.clear();
  std::fill(shared.begin(), shared.end(), 0xff);  // NaN
  barriers = {};
  mbarriers.clear(), loads.clear(), accumulators.clear();
  num_agents = num_warps;
  global_fence = false;
  released_to_warps.clear(), observed.clear();
  stamp_cta.push_back(cta);
  stamp_seen.assign(stamp_cta.size(), false);
  const int x = cta % launch.grid[0], y = cta / launch.grid[0] % launch.grid[1],
            z = cta / launch.grid[0] / launch.grid[1];
  for (int i = 0; i < num_warps; i++) {
    Warp& w = warps[i];
    w = Warp();
    w.id = i;
    w.registers.assign(size_t(launch.rows) * LANES, 0x7fedbeef);  // NaN
    w.predicates.assign(launch.predicates, 0);
    w.local.assign(size_t(launch.local_bytes) * LANES, 0xff);
    for (auto* of_rows : {&w.tags, &w.defined, &w.used, &w.operand}) of_rows->assign(launch.rows, 0);
    w.clock.at[i] = 1;
    for (int k = 0; k < launch.num_constants; k++) {
      u32 row = launch.constants[2 * k];
      std::fill_n(w.row(row), LANES, launch.constants[2 * k + 1]);
      w.defined[row] = ~0u;
    }
    // In decode.py's order: tid, ctaid, nctaid, ntid with x, y, z each, then laneid and warpid.
    const u32 values[] = {0,
                          0,
                          0,
                          u32(x),
                          u32(y),
                          u32(z),
                          u32(launch.grid[0]),
                          u32(launch.grid[1]),
                          u32(launch.grid[2]),
                          u32(launch.threads),
                          1,
                          1,
                          0,
                          u32(i)};
    for (int k = 0; k < launch.num_special; k++)
      for (int lane = 0; lane < LANES; lane++) {
        int which = launch.special[2 * k + 1];
        w.row(launch.special[2 * k])[lane] = which == 0 ? i * LANES + lane : which == 12 ? lane : values[which];
      }
  }
  for (u32 turn = 0, idle = 0; !stopped; turn++) {
    std::vector<int> ready;
    bool all_done = true;
    for (Warp& w : warps) {
      if (w.state == Warp::RUNS) ready.push_back(w.id);
      all_done &= w.state == Warp::DONE;
    }
    if (ready.empty() || idle > 64 * ready.size() + 1000) {
      if (!all_done) explain_deadlock();
      break;
    }
    // A warp that yields to no one else's progress must not starve the others: idle moves on.
    int pick = launch.order == ROUND_ROBIN ? turn
               : launch.order == SHUFFLED  ? random()
               : launch.order == FIRST     ? idle
                                           : ready.size() - 1 - idle % ready.size();
    int quantum = launch.order == ROUND_ROBIN ? 64 : launch.order == SHUFFLED ? 1 + random() % 200 : 1 << 30;
    Warp& w = warps[ready[u32(pick) % ready.size()]];
    progress = yielded = false;
    int steps = 0;
    while (steps < quantum && !yielded && !stopped) {
      step(w);
      steps++;
      if (launch.completion == RANDOM && random() % 64 == 0 && !loads.empty())
        finish_load_for(loads[random() % loads.size()].mbarrier);
      if (launch.limit && total > launch.limit) {
        report(LIMIT, w.pc, w.id, 0, 0, -1, "after %lld warp instructions", (long long)total);
        stopped = true;
      }
    }
    idle = progress || steps > 8 ? 0 : idle + 1;
  }
  for (const TensorCopy& copy : loads)
    report(IN_FLIGHT, copy.pc, copy.warp, copy.lane, 0, -1,
           "the program ends before the copy to shared address %u does", copy.shared - SHARED_BASE);
}

extern "C" {
int emulator_entries() { return table().size(); }
const char* emulator_spellings(int i) { return table()[i].spellings; }
const char* emulator_signature(int i) { return table()[i].signature; }
int emulator_sizeof(int i) {
  return i == 0 ? sizeof(Instruction) : i == 1 ? sizeof(Region) : i == 2 ? sizeof(Report) : sizeof(Launch);
}

int emulator_run(const Launch* launch, s64* total) {
  Machine machine(*launch);
  for (int cta = launch->first_cta; cta < launch->last_cta && !machine.stopped; cta++) machine.run(cta);
  *total = machine.total;
  return machine.num_reports;
}
}
