//go:build amd64 || arm64

package mlx5

import (
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// disassemble returns the instructions of the package's functions, by name without the package, as they are in a program for an
// architecture. Names end in .abi0 for those in assembly: there are Go functions of the same names around them.
func disassemble(t *testing.T, arch string) map[string][]string {
	t.Helper()
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("no go command")
	}
	program := filepath.Join(t.TempDir(), "mlx5.test")
	run := func(args ...string) []byte {
		cmd := exec.Command(goTool, args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOFLAGS=-trimpath -pgo=off") // as make builds
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	run("test", "-c", "-o", program, ".")
	const pkg = "internal/provider/mlx5."
	funcs := map[string][]string{}
	name := ""
	for line := range strings.Lines(string(run("tool", "objdump", "-s", regexp.QuoteMeta(pkg), program))) {
		if strings.HasPrefix(line, "TEXT ") {
			_, name, _ = strings.Cut(strings.Fields(line)[1], pkg)
			name = strings.TrimSuffix(name, "(SB)")
		} else if f := strings.Fields(line); len(f) > 3 && name != "" { // place, address, bytes, instruction
			funcs[name] = append(funcs[name], strings.Join(f[3:], " "))
		}
	}
	if len(funcs) < 50 {
		t.Fatalf("%d functions found", len(funcs))
	}
	return funcs
}

// The stores to registers and doorbell records are plain ones, with the fences that their order needs, and what posts and polls
// makes them by no other way.
func TestDoorbellInstructions(t *testing.T) {
	for arch, want := range map[string]map[string]string{
		"amd64": {
			"doorbell.abi0":   `MOVL CX, 0\(AX\).*SFENCE.*MOVQ BX, 0\(DX\).*SFENCE.*RET`,
			"blueFlame.abi0":  `MOVL CX, 0\(AX\).*SFENCE(.*MOVQ R1\d, (0x\w+|0)\(DX\)){8}.*JNE.*SFENCE.*RET`,
			"publish.abi0":    `MOVL CX, 0\(AX\).*RET`,
			"consumed.abi0":   `MOVL CX, 0\(AX\).*RET`,
			"fromDevice.abi0": `^RET`,
		},
		"arm64": {
			"doorbell.abi0":   `DMB \$2.*MOVW R1, \(R0\).*DSB \$14.*MOVD R3, \(R2\).*DSB \$14.*RET`,
			"blueFlame.abi0":  `DMB \$2.*MOVW R1, \(R0\).*DSB \$14.*VST1.P .*\(R2\).*BNE.*DSB \$14.*RET`,
			"publish.abi0":    `DMB \$2.*MOVW R1, \(R0\).*RET`,
			"consumed.abi0":   `DMB \$3.*MOVW R1, \(R0\).*RET`,
			"fromDevice.abi0": `DMB \$1.*RET`,
		},
	} {
		t.Run(arch, func(t *testing.T) {
			funcs := disassemble(t, arch)
			// A locked instruction, or one that orders more than it should and is slow on device memory.
			locked := regexp.MustCompile(`\b(LOCK|XCHG\w*|CMPXCHG\w*|XADD\w*|MFENCE|STLR\w*|LDAXR\w*|STLXR\w*|SWPAL\w*|CAS\w*|LDADD\w*)\b`)
			for name, pattern := range want {
				text := strings.Join(funcs[name], "; ")
				if !regexp.MustCompile(pattern).MatchString(text) {
					t.Errorf("%s is %q, want %s", name, text, pattern)
				}
				if l := locked.FindString(text); l != "" {
					t.Errorf("%s has %s: %q", name, l, text)
				}
			}
			// Would it be found? This function has one.
			if text := strings.Join(funcs["(*cq).Notified"], "; "); !locked.MatchString(text) {
				t.Errorf("an atomic exchange is not seen: %q", text)
			}
			for caller, callees := range map[string][]string{
				"(*sendReg).ringOne":   {"doorbell", "blueFlame"},
				"(*sendReg).ringLast":  {"doorbell"},
				"(*qp).postSendLocked": {"(*sendReg).ringOne", "(*sendReg).ringLast"},
				"(*qp).postRecvLocked": {"publish"},
				"(*srq).PostRecv":      {"publish"},
				"(*cq).pollLocked":     {"consumed", "fromDevice"},
				"(*cq).Arm":            {"doorbell"},
				"(*record).clear":      {"publish"},
			} {
				text := strings.Join(funcs[caller], "; ")
				for _, callee := range callees {
					if !strings.Contains(text, "mlx5."+callee) {
						t.Errorf("%s does not call %s: %q", caller, callee, text)
					}
				}
			}
		})
	}
}

// Registers and records are reached by their types only, which nobody can store to: pointers to them are made in one place, of memory,
// and no other pointer is made of them; nobody stores a whole one.
func TestDoorbellSource(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	pointers := map[string]int{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, bad := range doorbellLeaks(t, name, text) {
			if bad.pointer && name == "memory_unsafe_linux.go" {
				pointers[bad.what]++
				continue
			}
			t.Errorf("%s: %s", bad.at, bad.what)
		}
	}
	if pointers["(*register)"] != 1 || pointers["(*[2]recordWord)"] != 1 || len(pointers) != 2 {
		t.Errorf("memory becomes registers and records by %v", pointers)
	}
	const leaky = `package mlx5
func f(r *register, rec *record, q *sendQueue, x []register) {
	*r = register{}
	*rec.word[0] = *rec.word[1]
	g((*register)(nil))
	*(*uint64)(unsafe.Pointer(r)) = 1
	put[uint32](unsafe.Pointer(q.record), 0, 1)
	p := unsafe.Pointer(rec.word[0])
	x[0] = x[1]
}`
	if n := len(doorbellLeaks(t, "leaky.go", []byte(leaky))); n != 7 {
		t.Errorf("%d of 7 places are seen", n)
	}
}

// A leak is a place in the source that may write to a register or a record.
type leak struct {
	at, what string
	pointer  bool // it makes a pointer to one
}

// doorbellLeaks finds places in a file that go around the types of registers and records.
func doorbellLeaks(t *testing.T, name string, text []byte) (list []leak) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, text, 0)
	if err != nil {
		t.Fatal(err)
	}
	show := func(n ast.Node) string {
		var b strings.Builder
		printer.Fprint(&b, fset, n)
		return b.String()
	}
	found := func(n ast.Node, what string, pointer bool) {
		list = append(list, leak{fset.Position(n.Pos()).String(), what, pointer})
	}
	device := regexp.MustCompile(`\b(register|recordWord)\b`)
	names := regexp.MustCompile(`(\.word\[\w+\]|\.halves\[.*\]|\.record|\.arm|^reg|^rec|^r)$`) // what holds pointers to them
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CompositeLit:
			if id, ok := n.Type.(*ast.Ident); ok && device.MatchString(id.Name) {
				found(n, show(n), false)
			}
		case *ast.CallExpr:
			if p, ok := n.Fun.(*ast.ParenExpr); ok && device.MatchString(show(p)) {
				found(n, show(p), true)
			} else if show(n.Fun) == "unsafe.Pointer" && names.MatchString(show(n.Args[0])) {
				found(n, show(n), false)
			}
		case *ast.AssignStmt:
			for _, l := range n.Lhs {
				if s, ok := l.(*ast.StarExpr); ok && names.MatchString(show(s.X)) && !device.MatchString(show(n.Rhs[0])) {
					found(l, show(n), false)
				}
			}
		case *ast.ArrayType:
			if id, ok := n.Elt.(*ast.Ident); ok && device.MatchString(id.Name) && n.Len == nil {
				found(n, show(n), false) // a slice of them, whose elements can be stored to
			}
		}
		return true
	})
	return list
}

// What the functions store, on the machine that runs the tests: an element that goes round the end of its queue as well.
func TestDoorbellStores(t *testing.T) {
	mem, err := mapPages(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer unmapPages(mem)
	for i := range mem[:512] {
		mem[i] = byte(i * 7)
	}
	rec := &record{word: [2]*recordWord{words(mem, 1024), words(mem, 1028)}}
	reg := registerAt(mem, 2048)
	doorbell(rec.word[1], 0x01020304, reg, 0x1122334455667788)
	if le.Uint32(mem[1028:]) != 0x01020304 || le.Uint64(mem[2048:]) != 0x1122334455667788 || le.Uint32(mem[1024:]) != 0 || le.Uint64(mem[2056:]) != 0 {
		t.Errorf("doorbell: %x %x", mem[1024:1032], mem[2048:2064])
	}
	blueFlame(rec.word[0], 7, reg, bytesOf(at(mem, 384, 64)), bytesOf(at(mem, 0, 1)), bytesOf(at(mem, 512, 1)), 4)
	if le.Uint32(mem[1024:]) != 7 || string(mem[2048:][:128]) != string(mem[384:512]) || string(mem[2176:][:128]) != string(mem[:128]) {
		t.Errorf("blueFlame: %x", mem[2048:][:256])
	}
	if mem[2048+256] != 0 {
		t.Error("blueFlame: more than was asked for")
	}
	publish(rec.word[0], 8)
	consumed(rec.word[1], 9)
	fromDevice()
	if le.Uint32(mem[1024:]) != 8 || le.Uint32(mem[1028:]) != 9 {
		t.Errorf("records: %x", mem[1024:1032])
	}
}
