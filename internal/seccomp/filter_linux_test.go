package seccomp

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// run interprets a filter as the kernel does, as far as compile uses it.
func run(t *testing.T, f []unix.SockFilter, data []byte) uint32 {
	t.Helper()
	var a uint32
	for pc := 0; pc < len(f); pc++ {
		i := f[pc]
		jump := func(yes bool) {
			if yes {
				pc += int(i.Jt)
			} else {
				pc += int(i.Jf)
			}
		}
		switch i.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = binary.NativeEndian.Uint32(data[i.K:])
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == i.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= i.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			jump(a > i.K)
		case unix.BPF_RET | unix.BPF_K:
			return i.K
		default:
			t.Fatalf("instruction %d has the code %#x", pc, i.Code)
		}
	}
	t.Fatal("the filter has no end")
	return 0
}

func TestCompile(t *testing.T) {
	const theArch = 0xc0000001
	f, err := compile(theArch, []Rule{
		{Call: 5},
		{Call: 16, Where: []Arg{{Index: 1, Value: 0xc0181b01}}},
		{Call: 41, Where: []Arg{{Value: 16}, {Index: 2, Value: 20}}, Errno: 93},
		{Call: 41, Where: []Arg{{Value: 16}, {Index: 2, Value: 21}}},
		{Call: 42},
		{Call: 1, Where: []Arg{{Value: 768, Last: 1023}}},
		{Call: 2, Where: []Arg{{Value: 5, Last: 7}, {Index: 1, Value: 9}, {Index: 2, Value: 1, Last: 0xffffffff}}},
		{Call: 2, Where: []Arg{{Value: 5, Last: 5}}, Errno: 93},
		{Call: 3},
	})
	if err != nil {
		t.Fatal(err)
	}
	const allow, notify, fails = unix.SECCOMP_RET_ALLOW, unix.SECCOMP_RET_USER_NOTIF, unix.SECCOMP_RET_ERRNO | 93
	for _, c := range []struct {
		arch, call uint32
		args       [6]uint64
		want       uint32
	}{
		{theArch, 5, [6]uint64{}, notify},
		{theArch + 1, 5, [6]uint64{}, allow},
		{theArch, 6, [6]uint64{}, allow},
		{theArch, 16, [6]uint64{3, 0xc0181b01}, notify},
		{theArch, 16, [6]uint64{3, 0xffffffff_c0181b01}, notify}, // as a negative int
		{theArch, 16, [6]uint64{0xc0181b01, 3}, allow},
		{theArch, 41, [6]uint64{16, 3, 20}, fails},
		{theArch, 41, [6]uint64{16, 3, 21}, notify},
		{theArch, 41, [6]uint64{16, 3, 22}, allow},
		{theArch, 41, [6]uint64{2, 3, 20}, allow},
		{theArch, 42, [6]uint64{16, 3, 20}, notify},
		{theArch, 1, [6]uint64{767}, allow},
		{theArch, 1, [6]uint64{768}, notify},
		{theArch, 1, [6]uint64{0xffffffff_00000300}, notify},
		{theArch, 1, [6]uint64{1023}, notify},
		{theArch, 1, [6]uint64{1024}, allow},
		{theArch, 1, [6]uint64{0xffffffff}, allow},
		{theArch, 2, [6]uint64{4, 9, 1}, allow},
		{theArch, 2, [6]uint64{5, 9, 1}, notify},
		{theArch, 2, [6]uint64{7, 9, 0xffffffff}, notify},
		{theArch, 2, [6]uint64{8, 9, 1}, allow},
		{theArch, 2, [6]uint64{6, 8, 1}, allow},
		{theArch, 2, [6]uint64{6, 9, 0}, allow},
		{theArch, 2, [6]uint64{5, 9, 0}, fails},
		{theArch, 3, [6]uint64{}, notify},
	} {
		data := make([]byte, 64)
		binary.NativeEndian.PutUint32(data[dataCall:], c.call)
		binary.NativeEndian.PutUint32(data[dataArch:], c.arch)
		for i, a := range c.args {
			binary.NativeEndian.PutUint64(data[dataArgs+8*i:], a)
		}
		if got := run(t, f, data); got != c.want {
			t.Errorf("call %d%v of %#x: %#x, want %#x", c.call, c.args, c.arch, got, c.want)
		}
	}
	if b := bytesFilter(filterBytes(f)); len(b) != len(f) || b[3] != f[3] {
		t.Error("a filter changes on its way to the launcher")
	}
}

func TestCompileRefuses(t *testing.T) {
	for name, rules := range map[string][]Rule{
		"argument 6": {{Call: 1, Where: []Arg{{Index: 6}}}},
		"too many":   {{Call: 1, Where: make([]Arg, 7)}},
		"too long":   make([]Rule, 5000),
	} {
		if _, err := compile(1, rules); err == nil {
			t.Errorf("%s was compiled", name)
		}
	}
}
