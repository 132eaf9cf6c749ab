package perf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
)

// ServerConfig says how a server takes part in measurements.
type ServerConfig struct {
	Device   string // local device; "" chooses
	Port     int    // the device's port, from 1; 0 takes the first active one
	GIDIndex int    // -1 chooses
	CPU      int    // processor to pin the measuring thread to; -1: none
	Once     bool   // end after the first client

	// Log, if not nil, is called with one line for each client and each test. Calls do not overlap.
	Log func(format string, args ...any)
}

// A Server takes part in the measurements of one client after the other.
type Server struct {
	cfg  ServerConfig
	vctx *verbs.Context
	host Host

	busy  chan struct{} // holds the token of the client that is being served
	logMu sync.Mutex
}

// NewServer opens the device.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Port < 0 || cfg.Port > 255 {
		return nil, fmt.Errorf("port %d of a device: want 1 to 255, or 0 for the first active one", cfg.Port)
	}
	vctx, err := verbs.Open(cfg.Device)
	if err != nil {
		return nil, fmt.Errorf("%w (`ringside devices` lists what there is)", err)
	}
	if _, err := choosePort(vctx, portOptions{port: uint8(cfg.Port), gidIndex: cfg.GIDIndex}); err != nil {
		vctx.Close()
		return nil, err
	}
	return &Server{cfg: cfg, vctx: vctx, host: hostOn(vctx, cfg.CPU), busy: make(chan struct{}, 1)}, nil
}

// Choice says which device the server uses, and why.
func (s *Server) Choice() verbs.Choice { return s.vctx.Choice() }

// Close closes the device. Call it after Serve has returned.
func (s *Server) Close() error { return closeDevice(s.vctx) }

func (s *Server) log(format string, args ...any) {
	if s.cfg.Log != nil {
		s.logMu.Lock()
		defer s.logMu.Unlock()
		s.cfg.Log(format, args...)
	}
}

// errServerStops is what a client is told when the server ends.
var errServerStops = errors.New("the server was stopped")

// errIdle is what a client is told that keeps others waiting.
var errIdle = fmt.Errorf("no test was asked for in %v, and other clients may be waiting", stepTimeout)

// Serve serves clients that connect to l until ctx ends; with ServerConfig.Once, until the first has gone. It closes l,
// and returns when nothing of it runs any more. The error is nil if it was told to end.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	var first sync.Once
	result := make(chan error, 1)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				select {
				case err := <-result:
					return err
				default:
					return nil
				}
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accepting clients: %w", err)
			}
			// Out of file descriptors, or the client has gone already: neither ends a server.
			s.log("accepting clients: %v", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		wg.Go(func() {
			served, err := s.client(ctx, conn)
			if served && s.cfg.Once {
				first.Do(func() {
					result <- err
					cancel(nil)
				})
			}
		})
	}
}

// handover is how long a client waits for its predecessor to go: commands of a script follow each other faster than a
// server notices that one has ended.
const handover = 3 * time.Second

// client serves one connection. served is false if it was refused.
func (s *Server) client(ctx context.Context, conn net.Conn) (served bool, err error) {
	who := conn.RemoteAddr()
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		conn.Close()
		return false, nil
	case <-time.After(handover):
		// Said without waiting for the client's hello: whoever serves must not be held up by whoever waits.
		_ = conn.SetDeadline(time.Now().Add(helloTimeout))
		_, _ = conn.Write(appendFrame(nil, &wireError{"the server is busy with another client's measurement, which this one would disturb: try again when it is over"}))
		drain(conn)
		s.log("%v refused: busy", who)
		return false, nil
	}
	c, peer, err := newControl(conn, s.host)
	if err != nil {
		s.log("%v refused: %v", who, err)
		return false, err
	}
	defer c.close()
	s.log("%v connected: %s (%s) on %s", who, peer.Device, peer.Provider, peer.Name)
	for {
		wait, stopWaiting := context.WithTimeoutCause(ctx, stepTimeout, errIdle)
		m, err := c.next(wait)
		stopWaiting()
		if err == nil {
			t, ok := m.(*setup)
			if !ok {
				err = fmt.Errorf("a %v frame came instead of a setup frame", m.frame())
			} else {
				err = s.test(ctx, c, t)
			}
		}
		switch {
		case err == nil:
			continue
		case ctx.Err() != nil:
			c.sendError(errServerStops)
			s.log("%v dropped: %v", who, errServerStops)
			return true, nil
		case c.alive.Err() != nil:
			why := context.Cause(c.alive)
			if !errors.Is(why, ErrPeerGone) {
				// What came could not be understood. Said to the peer, unless that is what the peer said itself.
				var pe *PeerError
				if !errors.As(why, &pe) {
					c.sendError(why)
				}
				s.log("%v dropped: %v", who, why)
				return true, why
			}
			s.log("%v is done", who)
			return true, nil
		}
		c.sendError(err)
		s.log("%v dropped: %v", who, err)
		return true, err
	}
}

// drain reads what the client has sent, so that closing does not reset the connection before it has read the reason.
func drain(conn net.Conn) {
	if t, ok := conn.(*net.TCPConn); ok {
		_ = t.CloseWrite()
	}
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	buf := make([]byte, 4096)
	for range 64 {
		if _, err := conn.Read(buf); err != nil {
			break
		}
	}
	conn.Close()
}

// A service is the server's half of a test, verbs or rpc.
type service interface {
	run() error             // until stop or halt
	ready() <-chan struct{} // closed when it is connected
	finish(messages uint64) // the client has sent that many: take those, then end
	halt()                  // end now
	report() (messages, sum uint64, path string)
}

// test does one test: frames on one goroutine, the loop on another.
func (s *Server) test(ctx context.Context, c *control, t *setup) error {
	if t.spec.Op == OpRPC {
		return s.testRPC(ctx, c, t)
	}
	side, err := newSide(s.vctx, t.spec, true, portOptions{uint8(s.cfg.Port), s.cfg.GIDIndex, t.spec.Path, c.near()})
	if err != nil {
		return err
	}
	defer side.close()
	if t.spec.Kind == Lat {
		side.grace = 0 // the client stops after an answer: nothing is in flight
	}
	local, err := side.endpoint()
	if err != nil {
		return err
	}
	v := newVerbsService(side)
	switch {
	case side.byCM:
		l, err := cmListen(s.vctx, c.near())
		if err != nil {
			return err
		}
		defer l.Close()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		local.service = l.Addr().String()
		v.cancel = cancel
		v.connect = func() error { return side.acceptCM(ctx, l, &t.endpoint) }
	case t.spec.Path == PathTCP:
		l, err := listenNear(c.conn)
		if err != nil {
			return err
		}
		defer l.Close()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		local.service = l.Addr().String()
		v.cancel = cancel
		v.connect = func() error {
			streams, err := acceptStreams(ctx, l, &t.endpoint)
			if err != nil {
				return err
			}
			return side.connect(ctx, &t.endpoint, streams)
		}
	default:
		if err := side.connect(ctx, &t.endpoint, nil); err != nil {
			return err
		}
	}
	path := side.path()
	if t.spec.Path == PathTCP {
		path = PathTCP.String()
	}
	s.log("  %v %v, %d bytes, %s", t.spec.Op, t.spec.Kind, t.spec.Size, path)
	return s.attend(ctx, c, local, v)
}

// attend says that the server is ready, runs the loop, and answers the client until it stops the test.
func (s *Server) attend(ctx context.Context, c *control, local endpoint, v service) error {
	ended := make(chan error, 1)
	var loop sync.WaitGroup
	loop.Go(func() { ended <- pinned(s.cfg.CPU, v.run) })
	defer loop.Wait()
	defer v.halt()
	defer context.AfterFunc(c.alive, v.halt)()

	if err := c.send(&ready{endpoint: local}); err != nil {
		return err
	}
	// A loop that fails has to be reported while the client's frames are waited for.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	failed := make(chan error, 1)
	loop.Go(func() {
		err := <-ended
		if err != nil && !errors.Is(err, errHalted) {
			cancel(err)
		}
		failed <- err
	})
	var start cpuTime
	var haveCPU bool
	for {
		m, err := c.next(ctx)
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *mark:
			select {
			case <-v.ready():
			case <-c.alive.Done():
				return context.Cause(c.alive)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			start, haveCPU = processCPU()
			if err := c.send(&marked{}); err != nil {
				return err
			}
		case *stop:
			end, ok := processCPU()
			v.finish(m.messages)
			if err := <-failed; err != nil && !errors.Is(err, errHalted) {
				return err
			}
			rep := &report{cpu: cpuTime{-1, 0}}
			if haveCPU && ok {
				rep.cpu = end.sub(start)
			}
			rep.messages, rep.atomicSum, rep.path = v.report()
			return c.send(rep)
		default:
			return fmt.Errorf("a %v frame came during a test", m.frame())
		}
	}
}

// verbsService runs the loops of a side.
type verbsService struct {
	side      *side
	connect   func() error       // what comes before the loop; nil: nothing
	cancel    context.CancelFunc // ends that; nil if it is nil
	connected chan struct{}      // closed behind that
	done      chan struct{}      // closed when a passive side may end
	once      sync.Once
}

func newVerbsService(s *side) *verbsService {
	return &verbsService{side: s, connected: make(chan struct{}), done: make(chan struct{})}
}

func (v *verbsService) ready() <-chan struct{} { return v.connected }

func (v *verbsService) run() error {
	s := v.side
	if v.connect != nil {
		if err := v.connect(); err != nil {
			return err
		}
	}
	close(v.connected)
	switch {
	case s.spec.Op == OpSend && s.spec.Kind == Lat:
		return s.pongSend()
	case s.spec.Op == OpWrite && s.spec.Kind == Lat:
		return s.pongWrite()
	case s.spec.Op == OpSend:
		return s.sink()
	}
	// The target of one-sided operations has nothing to do.
	<-v.done
	return nil
}

func (v *verbsService) finish(messages uint64) {
	v.side.target.Store(messages)
	v.side.stop()
	v.once.Do(func() { close(v.done) })
}

func (v *verbsService) halt() {
	if v.cancel != nil {
		v.cancel()
	}
	v.side.halt()
	v.once.Do(func() { close(v.done) })
}

func (v *verbsService) report() (messages, sum uint64, path string) {
	return v.side.received, v.side.atomicSum(), v.side.path()
}
