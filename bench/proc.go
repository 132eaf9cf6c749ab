package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A role is what this program does when it is started again as a child: it prints lines for the parent ("word rest")
// and reads the parent's.
var roles = map[string]func(args json.RawMessage) error{
	"grpc-server":     grpcServer,
	"grpc-client":     grpcClient,
	"ringside-server": ringsideServer,
	"ringside-client": ringsideClient,
	"memcpy":          memcpyRole,
	"flooder":         flooder,
	"sink-server":     sinkServer,
	"bare-server":     bareServer,
	"bare-client":     bareClient,
	"conns-server":    connsServer,
	"conns-client":    connsClient,
	"killed":          killed,
}

// childStdin is the child's standard input, line by line. Its end means that the parent is gone.
var childStdin = make(chan string)

func runRole(name string, args []string) {
	fn := roles[name]
	if fn == nil || len(args) != 1 {
		fmt.Fprintf(os.Stderr, "ringside-bench: no role %q with %d arguments\n", name, len(args))
		os.Exit(2)
	}
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			childStdin <- in.Text()
		}
		close(childStdin)
		time.Sleep(2 * time.Second) // for the role to tidy up
		os.Exit(0)
	}()
	stop, err := startProfile(name)
	if err == nil {
		err = fn(json.RawMessage(args[0]))
		stop()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "ringside-bench: role %s: %v\n", name, err)
		os.Exit(1)
	}
}

// profileEnv names the folder that every role writes a CPU profile to; see -profile.
const profileEnv = "RINGSIDE_BENCH_PROFILE"

func startProfile(role string) (stop func(), err error) {
	dir := os.Getenv(profileEnv)
	if dir == "" {
		return func() {}, nil
	}
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("%s-%d.pprof", role, os.Getpid())))
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, err
	}
	return func() {
		pprof.StopCPUProfile()
		f.Close()
	}, nil
}

// say prints a line for the parent.
func say(word string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // a type of this program that cannot be marshalled
	}
	fmt.Printf("%s %s\n", word, b)
}

// hear waits for the parent's line word.
func hear(word string) {
	for line := range childStdin {
		if line == word {
			return
		}
	}
}

// proc is a child in a role.
type proc struct {
	role  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string
	errs  strings.Builder
	done  chan struct{}
}

var (
	running   = map[*proc]bool{}
	runningMu sync.Mutex
)

// start runs this program again in a role.
func start(role string, args any) (*proc, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	return startCmd(role, elsewhere(strings.HasSuffix(role, "-server"), exe, "-role", role, string(b)))
}

// serverSpace is the network namespace that servers run in; empty: this one.
var serverSpace string

// listenEnv has servers listen at another address than 127.0.0.1.
const listenEnv = "RINGSIDE_BENCH_LISTEN"

func listenHost() string {
	if h := os.Getenv(listenEnv); h != "" {
		return h
	}
	return "127.0.0.1"
}

// elsewhere is exec.Command, in the servers' namespace if it is a server.
func elsewhere(server bool, args ...string) *exec.Cmd {
	if server && serverSpace != "" {
		args = append([]string{"ip", "netns", "exec", serverSpace}, args...)
	}
	return exec.Command(args[0], args[1:]...)
}

func startCmd(role string, cmd *exec.Cmd) (*proc, error) {
	p := &proc{role: role, cmd: cmd, lines: make(chan string, 1024), done: make(chan struct{})}
	var err error
	if p.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	pr, pw := io.Pipe()
	cmd.Stdout = pw
	cmd.Stderr = &p.errs
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	runningMu.Lock()
	running[p] = true
	runningMu.Unlock()
	go func() {
		in := bufio.NewScanner(pr)
		in.Buffer(nil, 1<<20)
		for in.Scan() {
			p.lines <- in.Text()
		}
		close(p.lines)
	}()
	go func() {
		cmd.Wait()
		pw.Close()
		close(p.done)
	}()
	return p, nil
}

// expect waits for the child's line word and decodes its value into v.
func (p *proc) expect(word string, v any, patience time.Duration) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		select {
		case line, ok := <-p.lines:
			if !ok {
				<-p.done
				return fmt.Errorf("%s ended: %v: %s", p.role, p.cmd.ProcessState, strings.TrimSpace(p.errs.String()))
			}
			if rest, ok := strings.CutPrefix(line, word+" "); ok {
				return json.Unmarshal([]byte(rest), v)
			}
		case <-timer.C:
			return fmt.Errorf("%s did not say %q within %v", p.role, word, patience)
		}
	}
}

// tell sends the child a line.
func (p *proc) tell(word string) error {
	_, err := io.WriteString(p.stdin, word+"\n")
	return err
}

// stop ends the child: asked by the end of its input, then killed.
func (p *proc) stop() {
	p.stdin.Close()
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
	runningMu.Lock()
	delete(running, p)
	runningMu.Unlock()
}

// stopAll kills what still runs.
func stopAll() {
	runningMu.Lock()
	defer runningMu.Unlock()
	for p := range running {
		p.cmd.Process.Kill()
	}
}

// usage is what a process has consumed up to now.
type usage struct {
	Mallocs uint64
	CPU     time.Duration // user and system
}

func usageNow() usage {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		panic(err) // cannot fail with these arguments
	}
	return usage{Mallocs: m.Mallocs, CPU: time.Duration(ru.Utime.Nano() + ru.Stime.Nano())}
}

func (u usage) since(v usage) usage { return usage{u.Mallocs - v.Mallocs, u.CPU - v.CPU} }

// serveUsage is the rest of a server's role: at "mark" it notes what it has consumed, at "report" it says the
// difference.
func serveUsage() error {
	var mark usage
	for line := range childStdin {
		switch line {
		case "mark":
			mark = usageNow()
			say("marked", true)
		case "report":
			say("usage", usageNow().since(mark))
		}
	}
	return nil
}
