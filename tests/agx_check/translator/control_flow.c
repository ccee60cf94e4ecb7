// A control-flow graph -> NIR's nested ifs and loops. LLVM's structurizecfg (passes.c) has made every loop one with a
// single exit and every branch one that joins again; here that is only found, by dominators.
#include "translator.h"

struct block {
  LLVMBasicBlockRef llvm;
  int successors[2], successor_count;
  int join;           // the immediate postdominator; block_count: the function's end
  bool is_header;     // of a loop
  BITSET_WORD* loop;  // of a header: the blocks inside
  int exit;           // of a header: where its loop leads to
  bool is_emitted;
};

enum { kNone = -1 };

static struct block blocks[kMaxBlocks];  // in reverse postorder
static int block_count, current;
static struct hash_table *index_of_block, *phi_registers;
static BITSET_WORD *dominators, *postdominators;
static unsigned words;

bool dominates(int block, int other) { return BITSET_TEST(dominators + other * words, block); }
int current_block(void) { return current; }

static int index_of(LLVMBasicBlockRef block) {
  return (int)(uintptr_t)_mesa_hash_table_search(index_of_block, block)->data;
}

static LLVMBasicBlockRef postorder[kMaxBlocks];

static void visit(LLVMBasicBlockRef block) {
  if (_mesa_hash_table_search(index_of_block, block)) return;
  _mesa_hash_table_insert(index_of_block, block, NULL);
  LLVMValueRef terminator = LLVMGetBasicBlockTerminator(block);
  for (int i = LLVMGetNumSuccessors(terminator) - 1; i >= 0; --i) visit(LLVMGetSuccessor(terminator, i));
  if (block_count == kMaxBlocks) die("more blocks than there is room for", NULL);
  postorder[block_count++] = block;
}

static void find_blocks(LLVMValueRef function) {
  visit(LLVMGetEntryBasicBlock(function));
  for (int i = 0; i < block_count; ++i) {
    blocks[i].llvm = postorder[block_count - 1 - i];
    _mesa_hash_table_insert(index_of_block, blocks[i].llvm, (void*)(uintptr_t)i);
  }
  for (int i = 0; i < block_count; ++i) {
    LLVMValueRef terminator = LLVMGetBasicBlockTerminator(blocks[i].llvm);
    int count = LLVMGetNumSuccessors(terminator);
    if (count > 2) die("terminator", terminator);
    for (int j = 0; j < count; ++j) blocks[i].successors[j] = index_of(LLVMGetSuccessor(terminator, j));
    if (count == 2 && blocks[i].successors[0] == blocks[i].successors[1]) count = 1;
    blocks[i].successor_count = count;
  }
  words = BITSET_WORDS(block_count + 1);
}

static void intersect(BITSET_WORD* set, const BITSET_WORD* other) {
  for (unsigned w = 0; w < words; ++w) set[w] &= other[w];
}

static bool replace(BITSET_WORD* old, const BITSET_WORD* set) {
  if (!memcmp(old, set, words * sizeof *set)) return false;
  memcpy(old, set, words * sizeof *set);
  return true;
}

// Sets of dominators and of postdominators, by iteration from everything; the function's end is block_count.
static void find_dominators(void) {
  const size_t bytes = words * sizeof(BITSET_WORD);
  dominators = malloc((block_count + 1) * bytes), postdominators = malloc((block_count + 1) * bytes);
  memset(dominators, 0xff, (block_count + 1) * bytes);
  memset(postdominators, 0xff, (block_count + 1) * bytes);
  BITSET_WORD* end = postdominators + block_count * words;
  memset(end, 0, bytes), BITSET_SET(end, block_count);
  memset(dominators, 0, bytes), BITSET_SET(dominators, 0);
  BITSET_WORD* set = malloc(bytes);
  for (bool changed = true; changed;) {
    changed = false;
    for (int i = block_count - 1; i >= 0; --i) {
      memset(set, 0xff, bytes);
      if (!blocks[i].successor_count) intersect(set, end);
      for (int j = 0; j < blocks[i].successor_count; ++j)
        intersect(set, postdominators + blocks[i].successors[j] * words);
      BITSET_SET(set, i);
      changed |= replace(postdominators + i * words, set);
    }
    for (int i = 1; i < block_count; ++i) {
      memset(set, 0xff, bytes);
      for (int p = 0; p < block_count; ++p)
        for (int j = 0; j < blocks[p].successor_count; ++j)
          if (blocks[p].successors[j] == i) intersect(set, dominators + p * words);
      BITSET_SET(set, i);
      changed |= replace(dominators + i * words, set);
    }
  }
  free(set);
}

// The nearest postdominator is the one that has most of them itself.
static void find_joins(void) {
  for (int i = 0; i < block_count; ++i) {
    int most = -1;
    for (int other = 0; other <= block_count; ++other) {
      if (other == i || !BITSET_TEST(postdominators + i * words, other)) continue;
      int count = 0;
      for (int k = 0; k <= block_count; ++k) count += !!BITSET_TEST(postdominators + other * words, k);
      if (count > most) most = count, blocks[i].join = other;
    }
  }
}

static void add_to_loop(struct block* header, int block) {
  if (BITSET_TEST(header->loop, block)) return;
  BITSET_SET(header->loop, block);
  for (int p = 0; p < block_count; ++p)
    for (int j = 0; j < blocks[p].successor_count; ++j)
      if (blocks[p].successors[j] == block) add_to_loop(header, p);
}

static void find_loops(void) {
  for (int i = 0; i < block_count; ++i)
    for (int j = 0; j < blocks[i].successor_count; ++j) {
      const int target = blocks[i].successors[j];
      if (!dominates(target, i)) continue;
      struct block* header = &blocks[target];
      header->is_header = true;
      if (!header->loop) {
        header->loop = calloc(words, sizeof(BITSET_WORD));
        BITSET_SET(header->loop, target);
      }
      add_to_loop(header, i);
    }
  for (int h = 0; h < block_count; ++h) {
    if (!blocks[h].is_header) continue;
    blocks[h].exit = kNone;
    for (int i = 0; i < block_count; ++i)
      for (int j = 0; j < blocks[i].successor_count; ++j) {
        const int target = blocks[i].successors[j];
        if (!BITSET_TEST(blocks[h].loop, i) || BITSET_TEST(blocks[h].loop, target)) continue;
        if (blocks[h].exit != kNone && blocks[h].exit != target) die("loop with several exits", NULL);
        blocks[h].exit = target;
      }
  }
}

// ---- emission: phis are registers until Mesa makes SSA of them ------------------------------------------------------

static nir_def* register_of(LLVMValueRef phi) { return _mesa_hash_table_search(phi_registers, phi)->data; }

static void declare_phis(void) {
  for (int i = 0; i < block_count; ++i) {
    LLVMValueRef phi = LLVMGetFirstInstruction(blocks[i].llvm);
    for (; phi && LLVMGetInstructionOpcode(phi) == LLVMPHI; phi = LLVMGetNextInstruction(phi)) {
      LLVMTypeRef type = LLVMTypeOf(phi);
      _mesa_hash_table_insert(phi_registers, phi, nir_decl_reg(b, components_of(type), bits_of(type), 0));
    }
  }
}

static void assign_phis(int from, int to) {
  LLVMValueRef phi = LLVMGetFirstInstruction(blocks[to].llvm);
  for (; phi && LLVMGetInstructionOpcode(phi) == LLVMPHI; phi = LLVMGetNextInstruction(phi))
    for (unsigned k = 0; k < LLVMCountIncoming(phi); ++k)
      if (LLVMGetIncomingBlock(phi, k) == blocks[from].llvm) {
        nir_store_reg(b, value_of(LLVMGetIncomingValue(phi, k)), register_of(phi));
        break;
      }
}

static void emit_block(int index) {
  struct block* block = &blocks[index];
  if (block->is_emitted) die("control flow that is not structured", LLVMGetBasicBlockTerminator(block->llvm));
  block->is_emitted = true;
  current = index;
  LLVMValueRef i = LLVMGetFirstInstruction(block->llvm);
  for (; !LLVMIsATerminatorInst(i); i = LLVMGetNextInstruction(i)) {
    const bool is_phi = LLVMGetInstructionOpcode(i) == LLVMPHI;
    nir_def* def = is_phi ? nir_load_reg(b, register_of(i)) : translate_instruction(i);
    if (def) define(i, def);
  }
}

static void emit_region(int first, int stop, int header);

// Jumps if `target` is an end of the loop of `header`.
static bool jump(int target, int header) {
  if (header == kNone) return false;
  if (target != header && target != blocks[header].exit) return false;
  nir_jump(b, target == header ? nir_jump_continue : nir_jump_break);
  return true;
}

static void emit_arm(int from, int to, int stop, int header) {
  assign_phis(from, to);
  if (!jump(to, header) && to != stop) emit_region(to, stop, header);
}

// Where both arms of a branch go on, kNone if each runs to its own end.
static int join_of(int index, int header, bool* both_leave) {
  const struct block* block = &blocks[index];
  int join = block->join;
  *both_leave = false;
  if (header == kNone) return join;
  bool leaves[2];
  for (int j = 0; j < 2; ++j) leaves[j] = block->successors[j] == header || block->successors[j] == blocks[header].exit;
  *both_leave = leaves[0] && leaves[1];
  const bool is_outside = join == block_count || !BITSET_TEST(blocks[header].loop, join);
  if (!is_outside && join != header) return join;
  if (leaves[0] != leaves[1]) return block->successors[leaves[0] ? 1 : 0];
  return is_outside ? kNone : header;
}

static void emit_branch(int index, int join, int header) {
  const struct block* block = &blocks[index];
  nir_def* condition = value_of(LLVMGetCondition(LLVMGetBasicBlockTerminator(block->llvm)));
  nir_if* branch = nir_push_if(b, condition);
  emit_arm(index, block->successors[0], join, header);
  nir_push_else(b, branch);
  emit_arm(index, block->successors[1], join, header);
  nir_pop_if(b, branch);
}

// Blocks from `first` to before `stop`, inside the loop of `header`, if any.
static void emit_region(int first, int stop, int header) {
  for (int index = first; index != stop && index != block_count;) {
    int next;
    if (blocks[index].is_header && index != header) {
      nir_loop* loop = nir_push_loop(b);
      emit_region(index, kNone, index);
      nir_pop_loop(b, loop);
      next = blocks[index].exit;
    } else {
      emit_block(index);
      if (!blocks[index].successor_count) return;
      if (blocks[index].successor_count == 1) {
        next = blocks[index].successors[0];
        assign_phis(index, next);
      } else {
        bool both_leave;
        next = join_of(index, header, &both_leave);
        emit_branch(index, next, header);
        if (both_leave || next == kNone) return;
      }
    }
    if (next == stop || jump(next, header)) return;
    index = next;
  }
}

void translate_function(LLVMValueRef function) {
  index_of_block = _mesa_pointer_hash_table_create(NULL);
  phi_registers = _mesa_pointer_hash_table_create(NULL);
  find_blocks(function);
  find_dominators();
  find_joins();
  find_loops();
  declare_phis();
  emit_region(0, kNone, kNone);
}
