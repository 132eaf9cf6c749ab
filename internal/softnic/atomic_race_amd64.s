//go:build race

#include "textflag.h"

// func add64(p *uint64, d uint64) uint64
TEXT ·add64(SB), NOSPLIT, $0-24
	MOVQ p+0(FP), BX
	MOVQ d+8(FP), AX
	LOCK
	XADDQ AX, 0(BX)
	MOVQ AX, ret+16(FP)
	RET

// func cas64(p *uint64, o, n uint64) bool
TEXT ·cas64(SB), NOSPLIT, $0-25
	MOVQ p+0(FP), BX
	MOVQ o+8(FP), AX
	MOVQ n+16(FP), CX
	LOCK
	CMPXCHGQ CX, 0(BX)
	SETEQ ret+24(FP)
	RET

// func load64(p *uint64) uint64
TEXT ·load64(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), BX
	MOVQ 0(BX), AX
	MOVQ AX, ret+8(FP)
	RET
