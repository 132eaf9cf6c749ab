package perf

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// ListeningPrefix is how the line begins in which a server says on standard output where it listens; the address
// follows, up to the next space or the end of the line.
const ListeningPrefix = "listening on "

// spawnTimeout is how long a server that was started may take to listen, and spawnGrace how long it may take to end.
const (
	spawnTimeout = 20 * time.Second
	spawnGrace   = 5 * time.Second
)

// A Child is a server process that Spawn has started.
type Child struct {
	Addr string // where it listens

	cmd   *exec.Cmd
	stdin io.Closer
	once  sync.Once
	err   error
}

// Spawn starts a server as a process of its own on this host: the program path with args, which has to print a line that
// begins with ListeningPrefix, and to end when its standard input does. Its standard error goes to stderr.
func Spawn(ctx context.Context, path string, args []string, stderr io.Writer) (*Child, error) {
	cmd := exec.Command(path, args...)
	cmd.Stderr = stderr
	cmd.WaitDelay = spawnGrace
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting a server: %w", err)
	}
	c := &Child{cmd: cmd, stdin: stdin}
	type answer struct {
		addr string
		err  error
	}
	said := make(chan answer, 1)
	go func() {
		line, err := bufio.NewReader(io.LimitReader(stdout, 4096)).ReadString('\n')
		addr, ok := strings.CutPrefix(strings.TrimSpace(line), ListeningPrefix)
		addr, _, _ = strings.Cut(addr, " ")
		switch {
		case err != nil:
			err = errors.New("it ended before it listened")
		case !ok:
			err = fmt.Errorf("it said %q instead of where it listens", line)
		}
		said <- answer{addr, err}
	}()
	select {
	case a := <-said:
		if a.err != nil {
			werr := c.Close()
			return nil, fmt.Errorf("the server that was started does not serve: %w", errors.Join(a.err, werr))
		}
		c.Addr = a.addr
		return c, nil
	case <-time.After(spawnTimeout):
		err = fmt.Errorf("the server that was started does not listen after %v", spawnTimeout)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	_ = cmd.Process.Kill()
	_ = c.Close()
	return nil, err
}

// Close ends the server, by closing its standard input; killing it if that does not help. It returns how it ended.
func (c *Child) Close() error {
	c.once.Do(func() {
		c.stdin.Close()
		kill := time.AfterFunc(spawnGrace, func() { _ = c.cmd.Process.Kill() })
		defer kill.Stop()
		if err := c.cmd.Wait(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			c.err = fmt.Errorf("the server that was started ended badly: %w", err)
		}
	})
	return c.err
}
