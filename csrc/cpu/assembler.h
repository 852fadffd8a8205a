// The few x86-64 instructions of which generated code is made (generated.h), with vectors of 64 bytes (AVX-512 F and
// DQ). Encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace sparsekd::cpu {

enum class Register : int { rax = 0, rcx = 1, rdx = 2, rsi = 6, rdi = 7, r8 = 8, r9 = 9, r10 = 10, r11 = 11 };

class Assembler {
 public:
  size_t size() const { return size_; }
  std::vector<uint8_t> code() const { return {code_.begin(), code_.begin() + static_cast<std::ptrdiff_t>(size_)}; }
  void align(size_t to) {
    while (size_ % to != 0) put(0xcc);  // int3: nobody comes here
  }

  // Vector registers are numbers.
  void load(int to, Register base, int32_t at) { memory(0, 0, 0x10, to, 0, base, at, 64); }            // vmovups
  // Of memory that a lane of mask register 1 .. 7 does not ask for nothing is read; the lane becomes zero.
  void load(int to, Register base, int32_t at, int mask) { memory(0, 0, 0x10, to, 0, base, at, 64, false, mask); }
  void store(int from, Register base, int32_t at) { memory(0, 0, 0x11, from, 0, base, at, 64); }       // vmovups
  void broadcast(int to, Register base, int32_t at) { memory(1, 1, 0x18, to, 0, base, at, 4); }        // vbroadcastss
  void add(int to, Register base, int32_t at) { memory(0, 0, 0x58, to, to, base, at, 64); }            // vaddps
  // vfmadd231ps with one number of memory in all lanes.
  void multiply_add(int to, int a, Register base, int32_t at) { memory(1, 1, 0xb8, to, a, base, at, 4, true); }
  // vfmadd231ps with a vector of memory
  void multiply_add_vector(int to, int a, Register base, int32_t at) { memory(1, 1, 0xb8, to, a, base, at, 64); }
  void add(int to, int a, int b) { registers(0, 0, 0x58, to, a, b); }                // vaddps
  void interleave(int to, int a, int b, bool upper) {                                // vunpcklps, vunpckhps
    registers(0, 0, upper ? 0x15 : 0x14, to, a, b);
  }
  void choose_numbers(int to, int a, int b, uint8_t which) {                         // vshufps
    registers(0, 0, 0xc6, to, a, b);
    put(which);
  }
  void choose_quarters(int to, int a, int b, uint8_t which) {                        // vshuff32x4
    registers(2, 1, 0x23, to, a, b);
    put(which);
  }
  void clear(int to) { registers(0, 0, 0x57, to, to, to); }                // vxorps
  void raise(int to, int least) { registers(0, 0, 0x5f, to, least, to); }  // vmaxps; NaN stays NaN
  void lower(int to, int most) { registers(0, 0, 0x5d, to, most, to); }    // vminps

  void load_mask(int to, Register base, int8_t at) {  // kmovw, base below r8
    for (const int byte : {0xc5, 0xf8, 0x90}) put(static_cast<uint8_t>(byte));
    put(modrm(1, to, number_of(base)));
    put(static_cast<uint8_t>(at));
  }
  void prefetch_to_write(Register base, int8_t at) {  // prefetchw [base + at]
    if (number_of(base) >= 8) put(0x41);
    put(0x0f);
    put(0x0d);
    put(modrm(1, 1, number_of(base)));
    put(static_cast<uint8_t>(at));
  }
  void add(Register to, int32_t number) {  // add r64, imm32
    put(rex(0, to));
    put(0x81);
    put(modrm(3, 0, number_of(to)));
    put_number(number);
  }
  void add(Register to, Register from) {  // add r64, r64
    put(rex(number_of(from), to));
    put(0x01);
    put(modrm(3, number_of(from), number_of(to)));
  }
  void load(Register to, Register base, int8_t at) {  // mov r64, [base + at]
    put(rex(number_of(to), base));
    put(0x8b);
    put(modrm(1, number_of(to), number_of(base)));
    put(static_cast<uint8_t>(at));
  }
  void jump(Register base, int8_t at) {  // jmp [base + at]
    put(0xff);
    put(modrm(1, 4, number_of(base)));
    put(static_cast<uint8_t>(at));
  }
  void jump(Register to) {  // jmp r64, of r8 .. r15
    put(0x41);
    put(0xff);
    put(modrm(3, 4, number_of(to)));
  }
  void load_argument(Register to) {  // mov r64, [rsp + 8]: the seventh, where nothing was pushed
    put(static_cast<uint8_t>(0x48 | (number_of(to) >> 3) << 2));
    for (const int byte : {0x8b, modrm(1, number_of(to), 4) + 0, 0x24, 0x08}) put(static_cast<uint8_t>(byte));
  }
  void copy(Register to, Register from) {  // mov r64, r64
    put(rex(number_of(from), to));
    put(0x89);
    put(modrm(3, number_of(from), number_of(to)));
  }
  void load_number(Register to, Register base, int8_t at) {  // movsxd r64, [base + at]
    put(rex(number_of(to), base));
    put(0x63);
    put(modrm(1, number_of(to), number_of(base)));
    put(static_cast<uint8_t>(at));
  }
  void compare(Register a, Register b) {  // cmp r64, r64
    put(rex(number_of(b), a));
    put(0x39);
    put(modrm(3, number_of(b), number_of(a)));
  }
  void count_down(Register r) {  // dec r64
    put(rex(0, r));
    put(0xff);
    put(modrm(3, 1, number_of(r)));
  }
  // To what was assembled before.
  void call(size_t to) { relative({0xe8}, to); }                      // call rel32
  void jump_if_below(size_t to) { relative({0x0f, 0x82}, to); }       // jb rel32
  void jump_if_zero(size_t to) { relative({0x0f, 0x84}, to); }        // jz rel32
  void prefetch_code(int32_t ahead) {  // prefetcht0 [rip + ahead]
    for (const int byte : {0x0f, 0x18, 0x0d}) put(static_cast<uint8_t>(byte));
    put_number(ahead);
  }
  void give_back() { put(0xc3); }  // ret
  void leave() {  // vzeroupper, ret
    for (const int byte : {0xc5, 0xf8, 0x77, 0xc3}) put(static_cast<uint8_t>(byte));
  }

 private:
  static int number_of(Register r) { return static_cast<int>(r); }
  static uint8_t modrm(int mode, int reg, int rm) {
    return static_cast<uint8_t>(mode << 6 | (reg & 7) << 3 | (rm & 7));
  }
  static uint8_t rex(int reg, Register rm) {
    return static_cast<uint8_t>(0x48 | (reg >> 3) << 2 | number_of(rm) >> 3);
  }

  void put(uint8_t byte) {
    if (size_ == code_.size()) code_.resize(2 * size_ + 4096);
    code_[size_++] = byte;
  }
  void relative(std::initializer_list<uint8_t> opcode, size_t to) {
    for (const uint8_t byte : opcode) put(byte);
    put_number(static_cast<int32_t>(static_cast<int64_t>(to) - static_cast<int64_t>(size_ + 4)));
  }
  void put_number(int32_t number) {
    for (int i = 0; i < 4; ++i) put(static_cast<uint8_t>(static_cast<uint32_t>(number) >> 8 * i));
  }

  // EVEX, before the opcode. `map`: 0 is 0F, 1 is 0F38, 2 is 0F3A; `must`: 0 is no prefix, 1 is 66; `rm`: what modrm's
  // last field names; `spread`: one number of memory goes to all lanes; `mask`: lanes that it leaves out become zero.
  void prefix(int map, int must, int reg, int vvvv, int rm, bool spread, int mask = 0) {
    const auto off = [](int number, int bit) { return ~number >> bit & 1; };
    put(0x62);
    put(static_cast<uint8_t>(off(reg, 3) << 7 | off(rm, 4) << 6 | off(rm, 3) << 5 | off(reg, 4) << 4 | (map + 1)));
    put(static_cast<uint8_t>((~vvvv & 15) << 3 | 1 << 2 | must));
    put(static_cast<uint8_t>((mask > 0 ? 1 : 0) << 7 | 2 << 5 | (spread ? 1 : 0) << 4 | off(vvvv, 4) << 3 | mask));
  }
  void registers(int map, int must, uint8_t opcode, int reg, int vvvv, int rm) {
    prefix(map, must, reg, vvvv, rm, false);
    put(opcode);
    put(modrm(3, reg, rm));
  }
  // A displacement of one byte counts what the operand takes in memory.
  void memory(int map, int must, uint8_t opcode, int reg, int vvvv, Register base, int32_t at, int32_t operand,
              bool spread = false, int mask = 0) {
    prefix(map, must, reg, vvvv, number_of(base), spread, mask);
    put(opcode);
    const bool near = at % operand == 0 && at / operand >= -128 && at / operand <= 127;
    put(modrm(near ? 1 : 2, reg, number_of(base)));
    if (near) {
      put(static_cast<uint8_t>(at / operand));
    } else {
      put_number(at);
    }
  }

  std::vector<uint8_t> code_;  // with room at its end
  size_t size_ = 0;
};

}  // namespace sparsekd::cpu
