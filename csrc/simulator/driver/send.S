// objc_msgSend and its two variants: save every argument register, ask for the method, restore, tail-jump. Arguments on the
// stack stay where they are, and an exception thrown by the method unwinds straight into the sender.

#if defined(__x86_64__)

// \self and \selector: where this variant has them. The first 16 bytes below the frame hold nothing: alignment.
.macro send name, self, selector
  .globl \name
  .type \name, @function
\name:
  .cfi_startproc
  pushq %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  movq %rsp, %rbp
  .cfi_def_cfa_register %rbp
  subq $192, %rsp
  movq %rdi, 128(%rsp)
  movq %rsi, 136(%rsp)
  movq %rdx, 144(%rsp)
  movq %rcx, 152(%rsp)
  movq %r8, 160(%rsp)
  movq %r9, 168(%rsp)
  movq %rax, 176(%rsp)
  movaps %xmm0, 0(%rsp)
  movaps %xmm1, 16(%rsp)
  movaps %xmm2, 32(%rsp)
  movaps %xmm3, 48(%rsp)
  movaps %xmm4, 64(%rsp)
  movaps %xmm5, 80(%rsp)
  movaps %xmm6, 96(%rsp)
  movaps %xmm7, 112(%rsp)
  movq \self, %rdi
  movq \selector, %rsi
  movq 8(%rbp), %rdx
  call mfa_driver_resolve
  movq %rax, %r11
  movaps 0(%rsp), %xmm0
  movaps 16(%rsp), %xmm1
  movaps 32(%rsp), %xmm2
  movaps 48(%rsp), %xmm3
  movaps 64(%rsp), %xmm4
  movaps 80(%rsp), %xmm5
  movaps 96(%rsp), %xmm6
  movaps 112(%rsp), %xmm7
  movq 128(%rsp), %rdi
  movq 136(%rsp), %rsi
  movq 144(%rsp), %rdx
  movq 152(%rsp), %rcx
  movq 160(%rsp), %r8
  movq 168(%rsp), %r9
  movq 176(%rsp), %rax
  leave
  .cfi_def_cfa %rsp, 8
  jmp *%r11
  .cfi_endproc
  .size \name, . - \name
.endm

  .text
  .hidden mfa_driver_resolve
  send objc_msgSend, %rdi, %rsi
  send objc_msgSend_fpret, %rdi, %rsi
  send objc_msgSend_stret, %rsi, %rdx

// What a message to nil, or one that nothing answers, runs: zero in every register that may hold the result.
  .globl mfa_driver_zero
  .hidden mfa_driver_zero
  .type mfa_driver_zero, @function
mfa_driver_zero:
  .cfi_startproc
  xorl %eax, %eax
  xorl %edx, %edx
  pxor %xmm0, %xmm0
  pxor %xmm1, %xmm1
  ret
  .cfi_endproc
  .size mfa_driver_zero, . - mfa_driver_zero

#elif defined(__aarch64__)

  .text
  .hidden mfa_driver_resolve
  .globl objc_msgSend
  .type objc_msgSend, %function
objc_msgSend:  // x8, where a large result goes, is an argument too: arm64 has no stret variant
  .cfi_startproc
  stp x29, x30, [sp, #-224]!
  .cfi_def_cfa_offset 224
  .cfi_offset x29, -224
  .cfi_offset x30, -216
  mov x29, sp
  stp x0, x1, [sp, #16]
  stp x2, x3, [sp, #32]
  stp x4, x5, [sp, #48]
  stp x6, x7, [sp, #64]
  str x8, [sp, #80]
  stp q0, q1, [sp, #96]
  stp q2, q3, [sp, #128]
  stp q4, q5, [sp, #160]
  stp q6, q7, [sp, #192]
  mov x2, x30
  bl mfa_driver_resolve
  mov x16, x0
  ldp x0, x1, [sp, #16]
  ldp x2, x3, [sp, #32]
  ldp x4, x5, [sp, #48]
  ldp x6, x7, [sp, #64]
  ldr x8, [sp, #80]
  ldp q0, q1, [sp, #96]
  ldp q2, q3, [sp, #128]
  ldp q4, q5, [sp, #160]
  ldp q6, q7, [sp, #192]
  ldp x29, x30, [sp], #224
  .cfi_restore x29
  .cfi_restore x30
  .cfi_def_cfa_offset 0
  br x16
  .cfi_endproc
  .size objc_msgSend, . - objc_msgSend

  .globl mfa_driver_zero
  .hidden mfa_driver_zero
  .type mfa_driver_zero, %function
mfa_driver_zero:
  .cfi_startproc
  mov x0, #0
  mov x1, #0
  movi v0.2d, #0
  movi v1.2d, #0
  ret
  .cfi_endproc
  .size mfa_driver_zero, . - mfa_driver_zero

#else
#error "objc_msgSend is written for x86-64 and arm64"
#endif

  .section .note.GNU-stack, "", %progbits
