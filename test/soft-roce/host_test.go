//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestOptions(t *testing.T) {
	o, err := parseOptions([]string{"-kernel", "6.12", "-arch", "arm64", "-mem", "1024", "--", "go", "test", "-v", "./..."}, io.Discard)
	if err != nil || o.track != "6.12" || o.arch.name != "arm64" || o.memory != 1024 || !slices.Equal(o.command, []string{"go", "test", "-v", "./..."}) {
		t.Errorf("%+v, %v", o, err)
	}
	for _, args := range [][]string{
		{}, {"-kernel", "5.4", "--", "true"}, {"-arch", "s390x", "true"}, {"-native", "-arch", "s390x", "true"}, {"-native", "-build"}, {"-native", "-host", "true"}, {"-build", "true"}, {"-native", "-out", "/tmp", "true"},
		{"-mem", "3", "true"}, {"-out", "/no/such/folder", "true"}, {"-nonsense"},
	} {
		if o, err := parseOptions(args, io.Discard); err == nil {
			t.Errorf("%q: %+v", args, o)
		}
	}
}

// The workflow in docs/ci.md keeps the folder that is used in its job, where HOME is what GitHub makes it, and its command is one.
func TestWorkflow(t *testing.T) {
	text, err := os.ReadFile("../../docs/ci.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```yaml\n")
	workflow, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("docs/ci.md has no workflow")
	}
	find := func(expr string) string {
		if m := regexp.MustCompile(expr).FindStringSubmatch(workflow); m != nil {
			return m[1]
		}
		return ""
	}
	t.Setenv("HOME", "/github/home")
	t.Setenv("XDG_CACHE_HOME", find(`\bXDG_CACHE_HOME: ([^ }\n]+)`))
	dir, err := cacheFolder()
	if err != nil {
		t.Fatal(err)
	}
	kept := find(`\bpath: (\S+)`)
	if rel, err := filepath.Rel(kept, dir); err != nil || !filepath.IsLocal(rel) {
		t.Errorf("the workflow keeps %q, and the image is in %s", kept, dir)
	}
	args := strings.Fields(find(`go run github\.com/ringside-rdma/ringside/test/soft-roce (.*)`))
	if o, err := parseOptions(args, io.Discard); err != nil || !isGoTest(o.command) {
		t.Errorf("%q: %+v, %v", args, o, err)
	}
}

func TestGoTestRunsOnTheHost(t *testing.T) {
	for _, c := range []struct {
		argv []string
		want bool
	}{
		{[]string{"go", "test", "./..."}, true}, {[]string{"/usr/local/go/bin/go", "test"}, true},
		{[]string{"go", "vet"}, false}, {[]string{"go"}, false}, {[]string{"sh", "test"}, false},
	} {
		if got := isGoTest(c.argv); got != c.want {
			t.Errorf("%q: %v", c.argv, got)
		}
	}
	got := goTestArgs([]string{"go", "test", "-v", "./..."}, "/tmp/a b/soft-roce")
	if want := []string{"go", "test", "-exec", "'/tmp/a b/soft-roce'", "-v", "./..."}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	env := goTestEnv([]string{"A=B"}, arches[1], "/s", "/w")
	if want := []string{"A=B", socketEnv + "=/s", "GOTMPDIR=/w", "GOARCH=arm64", "CGO_ENABLED=0"}; !slices.Equal(env, want) {
		t.Errorf("got %q, want %q", env, want)
	}
	if env := goTestEnv([]string{"CGO_ENABLED=1"}, arches[0], "/s", "/w"); slices.Contains(env, "CGO_ENABLED=0") {
		t.Errorf("the user's choice is gone: %q", env)
	}
}

// With -host, go commands find in their flags who starts programs.
func TestExecInGoFlags(t *testing.T) {
	for was, want := range map[string]string{"": "-exec=/s", "-v -pgo=off": "-v -pgo=off -exec=/s"} {
		env, err := withExec([]string{"GOFLAGS=-x", "A=B", "GOFLAGS=" + was}, "/s")
		if last := env[len(env)-1]; err != nil || last != "GOFLAGS="+want {
			t.Errorf("%q: %q, %v", was, last, err)
		}
	}
	if _, err := withExec(nil, "/a b/s"); err == nil {
		t.Error("a path with spaces was taken")
	}
}

func init() {
	testutil.RegisterChild("native", func(args []string) {
		ctx, cancel := context.WithCancelCause(context.Background())
		go func() { cancel(errors.New(<-testutil.ChildInput())) }()
		_, err := runToTheLast(ctx, new(interrupt), []string{"sh", "-c", args[0]}, os.Environ())
		fmt.Println("ended:", err)
	})
}

// Without a machine, nothing is left of a command when its devices are removed.
func TestNothingIsLeftOfACommand(t *testing.T) {
	for _, c := range []struct {
		command string
		pids    int // lines with these
		stopped bool
	}{
		{"sleep 1000 & echo $!", 1, false},
		{`sleep 1000 & echo $!; sh -c 'trap "" TERM; sleep 1000 & echo $!; echo $$; wait' & wait`, 3, true},
	} {
		child := testutil.StartChild(t, "native", c.command)
		var pids []int
		for range c.pids {
			pid, err := strconv.Atoi(child.Line())
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
		if c.stopped {
			child.Send("stopped")
		}
		if end := child.Expect("ended:"); (end == "stopped") != c.stopped {
			t.Error(end)
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != unix.ESRCH {
				t.Errorf("%s: process %d is left: %v", c.command, pid, err)
			}
		}
	}
}

func TestCommandEnv(t *testing.T) {
	got := commandEnv([]string{"A=B", "GOTMPDIR=/w", socketEnv + "=/s", "RINGSIDE_VM=1", placeEnv + "=x", "RINGSIDE_VMX=1"}, "vm")
	if want := []string{"A=B", "RINGSIDE_VMX=1", placeEnv + "=vm"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestQEMUArgs(t *testing.T) {
	c := machineConfig{arch: arches[0], kernel: "/k", initrd: "/i", socket: "/tmp/a,b/vm", work: "/w", memory: 512, cpus: 3}
	line := strings.Join(qemuArgs(c), " ")
	for _, want := range []string{"-M pc", "-smp 3 -m 512", "path=/tmp/a,,b/vm", "-accel tcg", "-cpu max,-erms,", "console=ttyS0 ", "path=/,security_model=none,multidevs=remap,readonly=on"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %s", want, line)
		}
	}
	if strings.Contains(line, "mount_tag=out") {
		t.Error("a folder is shared that nobody asked for")
	}
	c.arch = arches[1]
	line = strings.Join(qemuArgs(c), " ")
	for _, want := range []string{"-M virt", "console=ttyAMA0 "} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %s", want, line)
		}
	}
	c.out, c.kvm = "/o", true
	line = strings.Join(qemuArgs(c), " ")
	for _, want := range []string{"mount_tag=out", "-accel kvm -cpu host"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %s", want, line)
		}
	}
}

func TestConsoleKeepsTheLastLines(t *testing.T) {
	var seen bytes.Buffer
	c := &console{verbose: &seen}
	if c.tail() != "" {
		t.Error("a console that saw nothing has a tail")
	}
	io.WriteString(c, "\x1b[2J\x1bcSeaBIOS\r\nfirst")
	io.WriteString(c, " line\r\n")
	if got := c.tail(); !strings.HasSuffix(got, "\n    SeaBIOS\n    first line") {
		t.Errorf("%q", got)
	}
	io.WriteString(c, strings.Repeat("more\n", 2*consoleLines)+"panic")
	if got := strings.Count(c.tail(), "more"); got != consoleLines {
		t.Errorf("%d lines are kept", got)
	}
	if !strings.HasSuffix(c.tail(), "panic") || !strings.Contains(seen.String(), "] first line\n") {
		t.Errorf("%q, %q", c.tail(), &seen)
	}
	io.WriteString(c, strings.Repeat("x", 1<<20)) // a machine that never ends its line
	if n := len(c.tail()); n > consoleLines*5000 {
		t.Errorf("%d bytes are kept", n)
	}
}

func TestAptAnswers(t *testing.T) {
	if got := kernelDependency("linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n  Conflicts: x\n"); got != "6.1.0-56-amd64" {
		t.Errorf("%q", got)
	}
	got := headerDependencies("h\n  Depends: linux-headers-6.1.0-56-common\n  Depends: linux-kbuild-6.1\n  Depends: linux-compiler-gcc-12-x86\n")
	if want := []string{"linux-headers-6.1.0-56-common", "linux-kbuild-6.1:" + runtime.GOARCH}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	debs := parseURIs("Reading lists...\n'http://d/p/x_1%3a2-3_amd64.deb' x_1%3a2-3_amd64.deb 123 SHA256:00\n'http://d/p/y_1_all.deb' y_1_all.deb 5 MD5Sum:0\n")
	if want := []deb{{"x_1%3a2-3_amd64.deb"}, {"y_1_all.deb"}}; !slices.Equal(debs, want) || debs[0].name() != "x" || debs[0].argument() != "x:amd64=1:2-3" || debs[1].argument() != "y=1" {
		t.Errorf("%q, %q, %q", debs, debs[0].argument(), debs[1].argument())
	}
}

func TestMissingPrograms(t *testing.T) {
	names, packages := missingPrograms([]hostProgram{{"sh", "dash"}, {"no-such-a", "pkg"}, {"no-such-b", "pkg"}})
	if !slices.Equal(names, []string{"no-such-a", "no-such-b"}) || !slices.Equal(packages, []string{"pkg"}) {
		t.Errorf("%q, %q", names, packages)
	}
}

func TestToolsAreChosen(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{
		"bin/ip", "usr/bin/rdma", "lib/x86_64-linux-gnu/libx.so.1.0", "usr/lib/x86_64-linux-gnu/libx.a", "usr/share/doc/x",
		"etc/libibverbs.d/rxe.driver", "etc/libibverbs.d/mlx4.driver",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("libx.so.1.0", filepath.Join(dir, "lib/x86_64-linux-gnu/libx.so.1")); err != nil {
		t.Fatal(err)
	}
	tr := tree{}
	if err := addTools(tr, dir, arches[0]); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"tools/etc/libibverbs.d/rxe.driver", "tools/usr/bin/ip", "tools/usr/bin/rdma",
		"tools/usr/lib/x86_64-linux-gnu/libx.so.1", "tools/usr/lib/x86_64-linux-gnu/libx.so.1.0",
	}
	var got []string
	for name := range tr {
		got = append(got, name)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Where the machine cannot run the host's programs, what has folders of them is hidden by its real name.
func TestProgramsAreHidden(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/programs", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("programs", dir+"/link"); err != nil {
		t.Fatal(err)
	}
	tr := tree{}
	hidePrograms(tr, strings.Join([]string{dir + "/link", dir + "/none", "relative", "/", ""}, ":"))
	if n, ok := tr["hides"+dir+"/programs"]; !ok || n.mode != typeDevice || n.major != 0 || n.minor != 0 {
		t.Errorf("%+v, %v", n, ok)
	}
	if _, ok := tr["hides/usr/bin"]; !ok {
		t.Error("/usr/bin is to be seen")
	}
	for name := range tr {
		if strings.HasSuffix(name, "/link") || strings.HasSuffix(name, "/none") || strings.Contains(name, "relative") || name == "hides/" {
			t.Errorf("%s is hidden", name)
		}
	}
}

// An image that another recipe made, or that is not complete, is not used.
func TestCurrentImage(t *testing.T) {
	a := arches[0]
	c := &cache{dir: t.TempDir(), log: t.Logf}
	img := &image{dir: filepath.Join(c.dir, "6.1.0-1-amd64", "image-x")}
	if err := os.MkdirAll(img.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	manifest := func(text string) {
		if err := os.WriteFile(filepath.Join(img.dir, manifestName), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.current("6.1", a); err == nil {
		t.Error("there is no link")
	}
	for range 2 { // it may be there already
		if err := c.link(c.linkTo("6.1", a), img); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.current("6.1", a); err == nil {
		t.Error("there is no manifest")
	}
	manifest(`{"Recipe":"another"}`)
	if _, err := c.current("6.1", a); err == nil {
		t.Error("it is made by another recipe")
	}
	manifest(`{"Recipe":"` + a.recipe() + `","Release":"6.1.0-1-amd64"}`)
	got, err := c.image(context.Background(), "6.1", a, false)
	if err != nil || got.dir != img.dir || got.manifest.Release != "6.1.0-1-amd64" {
		t.Errorf("%+v, %v", got, err)
	}
}
